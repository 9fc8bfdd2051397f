"""Adapters as fine-tunes: their configuration, their files, and what each kind adds to a tensor (`pieces`)."""
