"""What goes out as a canary first: how it is watched, and how it is promoted or taken back."""
