"""Which of the models that were seen have been still long enough to be taken. Pure: the time is an argument, in
seconds.

A model is looked at again when its time has come, and taken if it is as it was: so nothing is taken that changed
unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from continual.sources.directories import FolderSighting

PATIENCE = 60
"""A model that is not whole but has been still for this many settle times is handed on as it is, so that it is refused
with a reason."""
OLD = 60.0
"""Seconds for which a model must not have changed by its files' own times to count as still when it is first seen: the
clock of a file server may be some seconds off."""


class Unsettled(NamedTuple):
    """A model that is waited for: since when it has been as it is, and when it was last looked at."""

    sighting: FolderSighting
    since: float
    looked: float


@dataclass(slots=True)
class Settling:
    """The models that are waited for, by path. `settle`: seconds for which one must be still."""

    settle: float
    waiting: dict[str, Unsettled] = field(default_factory=dict)

    def saw(self, sighting: FolderSighting, now: float) -> None:
        """Takes a model as it is now."""
        before = self.waiting.get(sighting.path)
        same = before is not None and before.sighting.files == sighting.files
        self.waiting[sighting.path] = Unsettled(sighting, before.since if same and before else now, now)

    def seen(self, path: str) -> FolderSighting | None:
        """A model as it was when it was last looked at, if it is waited for."""
        found = self.waiting.get(path)
        return found and found.sighting

    def gone(self, path: str) -> None:
        """Forgets a model: it is not there any more, or need not be waited for."""
        self.waiting.pop(path, None)

    def were_still(self, now: float, clock: float) -> None:
        """Spares what was there at the start its settle time, if by the times of their files all of them have been
        still for long; else none, so that they come in their order. `clock`: seconds since 1970."""
        whole = [found for found in self.waiting.values() if found.sighting.whole]
        if all(clock - found.sighting.changed >= max(OLD, self.settle) for found in whole):
            for found in whole:
                self.waiting[found.sighting.path] = found._replace(since=now - self.settle)

    def due(self, now: float) -> list[str]:
        """Those whose time has come: they are to be looked at again."""
        return [path for path, found in self.waiting.items() if self._at(found) <= now]

    def take(self, now: float) -> list[FolderSighting]:
        """Those that have been still long enough and were looked at `now`, in the order in which they are to be folded.
        They are not waited for any more."""
        found = [w.sighting for w in self.waiting.values() if w.looked == now and self._at(w) <= now]
        for sighting in found:
            del self.waiting[sighting.path]
        return sorted(found, key=lambda s: (s.order, s.path))

    def next_look(self, now: float) -> float | None:
        """Seconds until one could be taken if nothing changes; None if none is waited for."""
        waits = [self._at(found) - now for found in self.waiting.values()]
        return max(0.0, min(waits)) if waits else None

    def _at(self, found: Unsettled) -> float:
        return found.since + self.settle * (1 if found.sighting.whole else PATIENCE)
