"""The `dystress` command."""
