"""`dystress inspect`."""
