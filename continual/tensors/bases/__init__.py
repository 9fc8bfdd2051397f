"""A base without weights that can be read as they are: as a state keeps it, and quantised."""
