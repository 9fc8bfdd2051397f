"""What a candidate changes: its task vectors and their digest, multiplied out or as thin factors."""
