"""A real daemon under what strangers publish and clients do: see `python -m tests.campaigns.hostile --help`."""
