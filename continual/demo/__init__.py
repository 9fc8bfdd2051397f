"""The demonstration: a small model trained on real digits, and the story of a daemon that folds its fine-tunes and is
killed half-way."""
