"""A watched folder whose clock is an argument: what is ready, and what is noted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from continual.sources.directories import keys, listed, look
from continual.sources.settling import Settling
from continual.sources.tree import Looking, Tree

RESCAN = 30.0


class Watched:
    """A tree over a folder, with a clock, and with the keys that are settled."""

    def __init__(self, root: Path, *, settle: float = 5.0, nested: bool = False) -> None:
        self.root = root
        self.now = 0.0
        self.known: set[str] = set()
        self.spent = 0.0
        self.step = 0.0
        self.ahead = 30.0  # so that what was made just now is neither old nor fresh
        looking = Looking(RESCAN, nested, self.known.__contains__, self._spent, lambda: time.time() + self.ahead)
        self.tree = Tree(str(root), Settling(settle), looking)

    def _spent(self) -> float:
        self.spent += self.step
        return self.spent

    def look(self, seconds: float = 0.0, *changed: str, everything: bool = False) -> list[str]:
        """What is ready after so many seconds more, of which a notice told `changed`."""
        self.now += seconds
        told = [str(self.root / name) for name in changed]
        return [self._name(s.path) for s in self.tree.look(self.now, told, everything=everything)]

    def notes(self) -> dict[str, str]:
        return {self._name(path): note for path, note in self.tree.noted.said.items()}

    def settle(self, names: Iterable[str]) -> None:
        for name in names:
            found = look(str(self.root / name))
            assert found is not None
            self.known.add(next(keys(found, listed(found.path))))

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.root)
