"""What keeps the daemon from doing its work as it should, though it runs: the reasons for which it calls itself
`degraded`. Pure; the clock is an argument. What stands still is for `/healthz`, and not decided here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from continual.service.queue import Queued
from continual.sources.contract import Source
from continual.texts import plain, size

REASONS = (
    "disk",
    "source",
    "token",
    "retrying",
    "internal",
    "cluster",
    "round",
    "publish",
    "release",
    "hook",
    "canary",
    "notify",
)
"""The words for what is wrong; operations.md says what each means and what to do."""
FAILED = 3
"""So many times each waiting candidate has failed when the queue is said to do nothing but retry."""
REMEMBERED = 3600.0
"""Seconds for which an exception that nobody expected is told of."""
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One thing that is wrong: its word in `REASONS`, and a sentence for people."""

    reason: str
    message: str


class Health:
    """What is known to be wrong. Written by the parts of the daemon, on the event loop; read by the service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds that never go back."""
        self._clock = clock
        self._failing: dict[tuple[str, str], str] = {}
        self._broke: tuple[float, str] | None = None
        self._disk: tuple[str, int, int] | None = None

    def broke(self, what: str, error: str) -> None:
        """An exception was raised that nobody expected, in `what`."""
        self._broke = (self._clock(), f"{what}: {error}")

    def fails(self, reason: str, which: str, error: str) -> None:
        """`which` (a publication, a round, a hook, the watch over a canary) did not work the last time, and is tried
        again."""
        self._failing[reason, which] = error

    def works(self, reason: str, which: str) -> None:
        """`which` works."""
        self._failing.pop((reason, which), None)

    def room(self, path: str, free: int, needs: int) -> None:
        """How many bytes are free on the disk of the state, and how many the next fold needs."""
        self._disk = (path, free, needs)

    def found(self, sources: Sequence[Source], waiting: Iterable[Queued]) -> list[Shortfall]:
        """All that is wrong now, in the order of `REASONS`."""
        told = [*self._disk_short(), *_sources(sources), *_queue(list(waiting)), *self._internal()]
        told += [Shortfall(reason, f"{which}: {error}") for (reason, which), error in list(self._failing.items())]
        told.sort(key=lambda shortfall: REASONS.index(shortfall.reason))
        return [Shortfall(found.reason, plain(found.message, _SHOWN)) for found in told]

    def _disk_short(self) -> list[Shortfall]:
        if self._disk is None:
            return []
        path, free, needs = self._disk
        told = f"{path}: {size(free)} free and the next fold needs {size(needs)}: free some space, or lower keep"
        return [Shortfall("disk", told)] if free < needs else []

    def _internal(self) -> list[Shortfall]:
        if self._broke is None or (ago := self._clock() - self._broke[0]) > REMEMBERED:
            return []
        told = f"{self._broke[1]}, {ago / 60:.0f} min ago: a bug of continual or its environment; the log has the trace"
        return [Shortfall("internal", told)]


def _sources(sources: Sequence[Source]) -> list[Shortfall]:
    return [Shortfall("token" if s.denied else "source", f"{s.name}: {s.problem}") for s in sources if s.problem]


def _queue(waiting: Sequence[Queued]) -> list[Shortfall]:
    denied = [queued for queued in waiting if queued.denied]
    told = [Shortfall("token", f"{denied[0].event.name}: {denied[0].error}")] if denied else []
    if waiting and all(queued.attempt >= FAILED for queued in waiting):
        first = min(waiting, key=lambda queued: queued.due)
        what = f"all {len(waiting)} candidates that wait failed" if len(waiting) > 1 else "the one that waits failed"
        told.append(Shortfall("retrying", f"{what} at least {FAILED} times: {first.event.name}: {first.error}"))
    return told
