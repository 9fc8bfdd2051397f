"""What of a candidate corresponds to what of its base: tensors by their names, rows of tables by their tokens."""
