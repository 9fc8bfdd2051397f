"""How much room the files of a state take on its disk. Reads alone; what goes meanwhile counts as nothing."""

from __future__ import annotations

from continual.state import storing
from continual.stores import Where

_KINDS = {"generations": "generations", "commits": "ledger", "HEAD": "ledger", "excerpts": "ledger"}
KINDS = ("generations", "ledger", "other")
"""What takes room: the generations, the records, and all else."""


def by_kind(state: Where) -> dict[str, int]:
    """Bytes that the files below the directory of a state take on the disk, for each of `KINDS`; a file with several
    names, as generations share them, counts once. Raises OSError where the directory cannot be listed."""
    found = dict.fromkeys(KINDS, 0)
    for name, nbytes in storing.taken(state, set()).items():
        found[_KINDS.get(name, "other")] += nbytes
    return found
