"""Adapters: thin wrappers over what the package exports, no arithmetic below this line."""
