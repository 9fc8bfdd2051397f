"""How much room the files of a state take on its disk. Reads alone; what goes meanwhile counts as nothing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from continual.state import storing
from continual.stores import ObjectPath, Where

_KINDS = {"generations": "generations", "commits": "ledger", "HEAD": "ledger", "excerpts": "ledger"}
KINDS = ("generations", "ledger", "other")
"""What takes room: the generations, the records, and all else."""


def by_kind(state: Where) -> dict[str, int]:
    """Bytes that the files below the directory of a state take on the disk, for each of `KINDS`; a file with several
    names, as generations share them, counts once. Raises OSError where the directory cannot be listed."""
    found = dict.fromkeys(KINDS, 0)
    if isinstance(state, ObjectPath):
        for name, nbytes in storing.sizes(state).items():
            found[_KINDS.get(name.partition("/")[0], "other")] += nbytes
        return found
    seen: set[int] = set()
    for entry in os.scandir(state):
        found[_KINDS.get(entry.name, "other")] += taken(entry.path, seen)
    return found


def taken(path: str | Path, seen: set[int]) -> int:
    """Bytes that a file, or all below a directory, take on the disk; files whose inodes are in `seen` count as nothing,
    and those that are counted are added to it."""
    total = _of(path, seen) if os.path.isfile(path) else 0
    for root, _, files in os.walk(path):
        total += sum(_of(os.path.join(root, file), seen) for file in files)
    return total


def _of(file: str | Path, seen: set[int]) -> int:
    with contextlib.suppress(FileNotFoundError):
        told = os.lstat(file)
        if told.st_ino not in seen:
            seen.add(told.st_ino)
            return 512 * told.st_blocks
    return 0
