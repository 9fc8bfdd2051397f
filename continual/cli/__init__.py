"""The command line: each command parses, calls `continual.api` and prints."""
