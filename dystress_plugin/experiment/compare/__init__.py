"""`dystress compare`."""
