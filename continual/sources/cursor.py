"""How far the Hub has been looked at, and what was seen there and is not settled: pure, the time is an argument
(seconds since 1970).

`lastModified` orders a listing and says where to stop reading it; what a candidate *is* is its repo and commit. Ties,
times that move and lists that come late are why a little more than what is new is read each time, and now and then
everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from continual.hub import Info

OVERLAP = 900.0
"""Seconds before the newest commit seen that are read again: lists are not always up to date."""


class Sighting(NamedTuple):
    """A repo at a commit (None: whatever it is when it is looked at). `first`: when it was seen; `modified`: when the
    Hub says it was committed; `by`: who saw it."""

    repo: str
    sha: str | None
    first: float
    modified: float
    by: str = "hub"

    @property
    def key(self) -> str:
        """The candidate's key, as far as it is known."""
        return f"hub:{self.repo}@{self.sha or ''}"


@dataclass(slots=True)
class Cursor:
    """`high`: the newest commit time of a listing that was read as far as was needed, by listing; `swept`: when all was
    read last; `seen`: what is not settled, by key; `asked`: what the settings were then, in a word."""

    high: dict[str, float] = field(default_factory=dict)
    swept: dict[str, float] = field(default_factory=dict)
    seen: dict[str, Sighting] = field(default_factory=dict)
    asked: str = ""
    given: set[str] = field(default_factory=set)

    def sweeps(self, listing: str, now: float, every: float) -> bool:
        """Whether a listing is to be read to its end."""
        return now - self.swept.get(listing, -every) >= every

    def read(
        self,
        listing: str,
        rows: Iterable[Info],
        now: float,
        known: Callable[[str], bool],
        wanted: Callable[[Info], bool],
        *,
        all_: bool,
    ) -> int:
        """Takes the rows of a listing, newest first, as far as they are needed (`all_`: to the end); how many were new.

        `known` says whether a key is settled. If a row cannot be had the error passes through: what was seen stays, and
        the cursor does not move.
        """
        stop = None if all_ else self.high.get(listing)
        newest, new = None, 0
        for row in rows:
            modified = row.modified.timestamp()
            newest = modified if newest is None else max(newest, modified)
            if stop is not None and modified < stop - OVERLAP:
                break
            if wanted(row):
                new += self.saw(Sighting(row.id, row.sha, now, modified), known)
        if newest is not None:
            self.high[listing] = max(
                min(newest, now), self.high.get(listing, 0.0)
            )  # a time that is ahead would hide what comes until then
        if stop is None:
            self.swept[listing] = now
        return new

    def saw(self, sighting: Sighting, known: Callable[[str], bool]) -> bool:
        """Takes one sighting; whether it was new and is open."""
        if sighting.key in self.seen or known(sighting.key):
            return False
        self.seen[sighting.key] = sighting
        return True

    def ready(self, now: float, settle: float) -> list[Sighting]:
        """What has been still long enough and was not given before, oldest commit first."""
        found = [s for key, s in self.seen.items() if key not in self.given and now >= self._due(s, settle)]
        self.given.update(s.key for s in found)
        return sorted(found, key=lambda s: (s.modified, s.repo))

    def next_ready(self, now: float, settle: float) -> float | None:
        """Seconds until something becomes ready by waiting alone; None if nothing waits."""
        waits = [self._due(s, settle) - now for key, s in self.seen.items() if key not in self.given]
        return max(0.0, min(waits)) if waits else None

    def done(self, key: str) -> None:
        """A sighting is settled, or is none of ours."""
        self.seen.pop(key, None)
        self.given.discard(key)

    def prune(self, known: Callable[[str], bool]) -> None:
        """Drops what was settled meanwhile."""
        self.seen = {key: s for key, s in self.seen.items() if not known(key)}

    def body(self) -> dict[str, Any]:
        """As it is kept on disk."""
        return {
            "asked": self.asked,
            "high": self.high,
            "swept": self.swept,
            "seen": [list(s) for s in self.seen.values()],
        }

    @classmethod
    def of(cls, body: Mapping[str, Any] | None, asked: str = "") -> Cursor:
        """From what was kept. Where other settings are `asked` for now, everything is read again: what they let in may
        have been passed over."""
        if body is None:
            return cls(asked=asked)
        seen = {s.key: s for s in (Sighting(*row) for row in body["seen"])}
        same = body["asked"] == asked
        return cls(dict(body["high"]) if same else {}, dict(body["swept"]) if same else {}, seen, asked)

    @staticmethod
    def _due(sighting: Sighting, settle: float) -> float:
        """A commit is still from when it was made; where the clocks disagree, from when it was seen."""
        return min(sighting.first, max(sighting.modified, 0.0) or sighting.first) + settle
