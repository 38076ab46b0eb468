"""`dystress report`."""
