"""What a merge is worth before it is committed: a command is asked about it, and about the merge in force."""
