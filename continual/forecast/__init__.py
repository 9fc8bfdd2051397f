"""What work takes of this machine: measured while it was done, and said before it is."""
