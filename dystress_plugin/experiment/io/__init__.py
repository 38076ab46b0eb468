"""Files, locks and interruptions: what every wing stands on."""
