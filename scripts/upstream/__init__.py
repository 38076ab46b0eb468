"""What a pull request to a host needs, made from the package's own source and from the host's own files."""
