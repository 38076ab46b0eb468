"""The `dystress` command: pretraining and evaluation, built on lightly, Lightning and torchvision/timm."""
