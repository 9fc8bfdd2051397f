"""What a person should know of a watched folder, one sentence for each directory: said at once, or once a directory has
been for long without a model. Pure: the time is an argument, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from continual.sources.directories import shown


class Pending(NamedTuple):
    """What is to be said of a directory if it stays as it has been since then."""

    what: str
    since: float


@dataclass(slots=True)
class Noted:
    """The notes by path. `patience`: seconds for which a directory must have been without a model."""

    patience: float
    said: dict[str, str] = field(default_factory=dict)
    _pending: dict[str, Pending] = field(default_factory=dict)

    def say(self, path: str, what: str) -> bool:
        """Says something of a directory, or (an empty text) nothing any more. Returns whether that is news."""
        self._pending.pop(path, None)
        before = self.said.pop(path, None)
        if what:
            self.said[path] = f"{shown(path)}: {what}"
        return self.said.get(path) != before

    def wait(self, path: str, what: str, since: float) -> None:
        """Has something said of a directory once it has been so for long enough."""
        if self.said.get(path) != f"{shown(path)}: {what}":
            self.say(path, "")
            self._pending[path] = Pending(what, since)

    def due(self, now: float) -> list[str]:
        """The directories that are to be looked at once more before it is said."""
        return [path for path, found in self._pending.items() if found.since + self.patience <= now]

    def ripen(self, now: float) -> None:
        """Says what has been so for long enough."""
        for path in self.due(now):
            self.say(path, self._pending[path].what)

    def next_due(self, now: float) -> float | None:
        """Seconds until something is to be said; None if nothing is."""
        if not self._pending:
            return None
        return min(found.since for found in self._pending.values()) + self.patience - now

    def concerns(self, path: str) -> bool:
        """Whether anything is said of a directory, or to be."""
        return path in self.said or path in self._pending
