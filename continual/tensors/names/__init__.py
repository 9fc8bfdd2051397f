"""What tensors are called: one canonical name for each weight, which names are one tensor, and which are of what
kind."""
