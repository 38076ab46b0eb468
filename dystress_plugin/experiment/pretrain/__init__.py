"""`dystress pretrain`."""
