"""The candidates that wait to be looked at: in which order they are taken, and when one that failed comes again. Pure;
the clock is an argument.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

from continual.records import Event
from continual.retrying import PARKED_AFTER, retry_delay
from continual.sources.contract import Source

Rank = tuple[bool, tuple[int, str], str]


@dataclass(slots=True)
class Queued:
    """An event in the queue, with the source that gave it. It is not looked at before the time `due`, and failed
    `attempt` times so far; `broke` of these were exceptions that nobody expected. `error` is what was said the last
    time, `denied` whether that was about a token that is not accepted."""

    event: Event
    source: Source
    attempt: int = 0
    due: float = 0.0
    broke: int = 0
    error: str = ""
    denied: bool = False

    @property
    def parked(self) -> bool:
        """Whether it failed so often that it comes again only once an hour."""
        return self.source.parks and self.attempt > PARKED_AFTER

    @property
    def rank(self) -> Rank:
        """Its place among those that are due: new ones before those that failed, then by time of modification, then by
        key."""
        return self.attempt > 0, self.event.order, self.event.key


@dataclass(slots=True)
class Queue:
    """The waiting candidates by the key of their event. A newer event of the same key replaces an older one.

    Two heaps, of those that are due and of those that are not, hold them in their orders, so that a take costs the same
    whether ten wait or ten thousand. Who was replaced stays in its heap until its turn comes, and is dropped then.
    """

    waiting: dict[str, Queued] = field(default_factory=dict)
    _due: list[tuple[Rank, int, Queued]] = field(default_factory=list)
    _later: list[tuple[float, int, Queued]] = field(default_factory=list)
    _number: count[int] = field(default_factory=count)

    def put(self, event: Event, source: Source) -> None:
        """Adds an event, or replaces an older one of the same key: the files have changed since. The same event once
        more changes nothing: one that failed keeps its count and its turn."""
        before = self.waiting.get(event.key)
        if before is not None and before.event == event:
            return
        self._add(Queued(event, source))

    def ordered(self) -> list[Queued]:
        """All of them in the order in which they are taken if all are due."""
        return sorted(self.waiting.values(), key=lambda queued: queued.rank)

    def take(self, now: float) -> Queued | None:
        """Removes and returns the first that is due; None if none is."""
        while self._later and self._later[0][0] <= now:
            due, number, queued = heapq.heappop(self._later)
            if self._waits(queued) and queued.due == due:
                heapq.heappush(self._due, (queued.rank, number, queued))
        while self._due:
            queued = heapq.heappop(self._due)[2]
            if self._waits(queued):
                return self.waiting.pop(queued.event.key)
        return None

    def again(self, failed: Queued, now: float, after: float = 0.0) -> float:
        """Puts back one that failed because of its environment, unless a newer event of its key came meanwhile.

        Returns the seconds until it is due, at least the `after` seconds that a server asked for.
        """
        failed.attempt += 1
        delay = retry_delay(failed.attempt, after, parks=failed.source.parks)
        failed.due = now + delay
        if failed.event.key not in self.waiting:
            self._add(failed)
        return delay

    def next_due(self) -> float | None:
        """The time at which the next one is due; None if nothing waits."""
        while self._due and not self._waits(self._due[0][2]):
            heapq.heappop(self._due)
        while self._later and not self._waits(self._later[0][2]):
            heapq.heappop(self._later)
        first = self._due or self._later
        return first[0][2].due if first else None

    def _add(self, queued: Queued) -> None:
        self.waiting[queued.event.key] = queued
        number = next(self._number)
        if queued.attempt:
            heapq.heappush(self._later, (queued.due, number, queued))
        else:
            heapq.heappush(self._due, (queued.rank, number, queued))

    def _waits(self, queued: Queued) -> bool:
        return self.waiting.get(queued.event.key) is queued
