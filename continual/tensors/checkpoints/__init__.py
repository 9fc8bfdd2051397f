"""Models as files: where they lie, their strict headers, and full checkpoints, read one tensor at a time."""
