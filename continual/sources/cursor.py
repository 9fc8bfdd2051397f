"""How far the listings of the Hub were read, and which repos were seen there and are not settled. Pure: the time is an
argument, in seconds since 1970.

A listing is ordered by `lastModified`, which says where reading it can stop. A candidate is a repo at a commit. Two
commits can have one time, a time can change, and a listing can be late: so each read goes a little further back than
what is new, and from time to time to the end. A read that has to stop before that leaves a rest, at which the next one
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from continual.hub import Info

OVERLAP = 900.0
"""Seconds before the newest commit seen that are read again: lists are not always up to date."""
MOST_SEEN = 50_000
"""Unsettled repos with which no further page is read, until some are settled: each takes half a kilobyte here and in
the queue."""


class Rest(NamedTuple):
    """What is left of a listing: the `page` to go on with, and the commit time down to which it is read (None: to its
    end)."""

    page: str
    stop: float | None


class Sieve(NamedTuple):
    """What goes into the cursor: `known` says whether a key is settled, `wanted` whether the settings let a repo in."""

    known: Callable[[str], bool]
    wanted: Callable[[Info], bool]


class Sighting(NamedTuple):
    """A repo at a commit (None: the one that is the newest when the repo is looked at). `first`: when it was seen;
    `modified`: when the Hub says it was committed; `by`: who saw it (`hub`, `webhook` or `retry`)."""

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
    """How far the source has come.

    `high`: by listing, the newest commit time that it had when it was read as far as needed; `swept`: by listing, when
    it was last read to the end; `seen`: what is not settled, by key; `asked`: a hash of the settings; `given`: the keys
    of `seen` that were handed on in this process; `rests`: by listing, what is left of a read that had to stop;
    `polled`: when the Hub last answered all that was asked. All times are seconds since 1970.
    """

    high: dict[str, float] = field(default_factory=dict)
    swept: dict[str, float] = field(default_factory=dict)
    seen: dict[str, Sighting] = field(default_factory=dict)
    asked: str = ""
    given: set[str] = field(default_factory=set)
    rests: dict[str, Rest] = field(default_factory=dict)
    polled: float | None = None

    @property
    def full(self) -> bool:
        """Whether so many are unsettled that no further page is read."""
        return len(self.seen) >= MOST_SEEN

    def sweeps(self, listing: str, now: float, every: float) -> bool:
        """Whether a listing is to be read to its end; not, while the rest of such a read is left."""
        rest = self.rests.get(listing)
        return (rest is None or rest.stop is not None) and now - self.swept.get(listing, -every) >= every

    def read(
        self,
        listing: str,
        rows: Iterable[Info],
        now: float,
        sieve: Sieve,
        *,
        all_: bool,
        cut: Callable[[], str | None] = lambda: None,
    ) -> int:
        """Takes the rows of a listing, newest first, as far as they are needed (`all_`: to the end). Returns how many
        were new.

        `cut` says after the last
        row at which page the rows were cut off, if they were: what is left becomes a rest. If a row cannot be had, the
        error of `rows` passes through: what was seen until then stays, and the cursor does not move.
        """
        high = self.high.get(listing)
        stop = None if all_ or high is None else high - OVERLAP
        newest, new = self._take(rows, stop, now, sieve)
        if newest is not None:
            self.high[listing] = max(
                min(newest, now), high or 0.0
            )  # a time ahead of us would hide what comes till then
        page = cut()
        before = self.rests.get(listing)
        if page is not None:  # down to where an earlier rest would have gone, too
            deep = stop is None or (before is not None and before.stop is None)
            lower = None if deep else min(s for s in (stop, before.stop if before else stop) if s is not None)
            self.rests[listing] = Rest(page, lower)
        elif stop is None:
            self.swept[listing] = now
            self.rests.pop(listing, None)
        return new

    def read_on(
        self,
        listing: str,
        rows: Iterable[Info],
        now: float,
        sieve: Sieve,
        cut: Callable[[], str | None],
    ) -> int:
        """Takes the rows of the rest of a listing, as `read`."""
        rest = self.rests[listing]
        _, new = self._take(rows, rest.stop, now, sieve)
        page = cut()
        if page is not None:
            self.rests[listing] = rest._replace(page=page)
            return new
        del self.rests[listing]
        if rest.stop is None:
            self.swept[listing] = now
        return new

    def lost(self, listing: str) -> None:
        """The rest of a listing cannot be had any more: it is read again to its end."""
        self.rests.pop(listing, None)
        self.swept.pop(listing, None)

    def _take(
        self,
        rows: Iterable[Info],
        stop: float | None,
        now: float,
        sieve: Sieve,
    ) -> tuple[float | None, int]:
        """Takes rows down to the time `stop`. Returns the newest time among them, and how many were new."""
        newest, new = None, 0
        for row in rows:
            modified = row.modified.timestamp()
            newest = modified if newest is None else max(newest, modified)
            if stop is not None and modified < stop:
                break
            if sieve.wanted(row):
                new += self.saw(Sighting(row.id, row.sha, now, modified), sieve.known)
        return newest, new

    def saw(self, sighting: Sighting, known: Callable[[str], bool]) -> bool:
        """Takes one sighting. Returns whether it was new and is not settled."""
        if sighting.key in self.seen or known(sighting.key):
            return False
        self.seen[sighting.key] = sighting
        return True

    def ready(self, now: float, settle: float) -> list[Sighting]:
        """The repos that had no new commit for `settle` seconds and were not given before, oldest commit first."""
        if len(self.given) == len(self.seen):  # as mostly, and this is asked whenever one is settled
            return []
        found = [s for key, s in self.seen.items() if key not in self.given and now >= self._due(s, settle)]
        self.given.update(s.key for s in found)
        return sorted(found, key=lambda s: (s.modified, s.repo))

    def next_ready(self, now: float, settle: float) -> float | None:
        """Seconds until a repo becomes ready if nothing happens; None if none waits."""
        if len(self.given) == len(self.seen):
            return None
        waits = [self._due(s, settle) - now for key, s in self.seen.items() if key not in self.given]
        return max(0.0, min(waits)) if waits else None

    def done(self, key: str) -> None:
        """Forgets a sighting: it is settled, or left out by the settings."""
        self.seen.pop(key, None)
        self.given.discard(key)

    def prune(self, known: Callable[[str], bool]) -> None:
        """Forgets all that `known` says are settled."""
        self.seen = {key: s for key, s in self.seen.items() if not known(key)}
        self.given &= self.seen.keys()

    def body(self) -> dict[str, Any]:
        """What is kept on disk: lists and numbers."""
        return {
            "asked": self.asked,
            "high": self.high,
            "swept": self.swept,
            "polled": self.polled,
            "rests": {listing: list(rest) for listing, rest in self.rests.items()},
            "seen": [list(s) for s in self.seen.values()],
        }

    @classmethod
    def of(cls, body: Mapping[str, Any] | None, asked: str = "") -> Cursor:
        """The cursor of a `body` (None: a new one). Under other settings than `asked` every listing is read again to
        its end, because what they let in may have been passed over."""
        if body is None:
            return cls(asked=asked)
        seen = {s.key: s for s in (Sighting(*row) for row in body["seen"])}
        same = body["asked"] == asked
        found = cls(dict(body["high"]) if same else {}, dict(body["swept"]) if same else {}, seen, asked)
        found.polled = body.get("polled")  # an earlier version did not say it
        if same:  # a cursor of before there were rests has none
            found.rests = {listing: Rest(*rest) for listing, rest in body.get("rests", {}).items()}
        return found

    @staticmethod
    def _due(sighting: Sighting, settle: float) -> float:
        """When a repo becomes ready: `settle` seconds after its commit, or after it was seen if the Hub's clock is
        ahead of ours."""
        return min(sighting.first, max(sighting.modified, 0.0) or sighting.first) + settle
