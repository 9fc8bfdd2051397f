"""What makes a merge and what reads it: folding, unfolding, combining, reading. It knows no HTTP, metrics or clock."""
