"""The candidates that wait to be looked at: in which order they are taken, and when one that failed comes again. Pure;
the clock is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from continual.records import Event
from continual.retrying import PARKED_AFTER, retry_delay
from continual.sources.contract import Source


@dataclass(slots=True)
class Queued:
    """An event in the queue, with the source that gave it. It is not looked at before the time `due`, and failed
    `attempt` times so far."""

    event: Event
    source: Source
    attempt: int = 0
    due: float = 0.0

    @property
    def parked(self) -> bool:
        """Whether it failed so often that it comes again only once an hour."""
        return self.source.parks and self.attempt > PARKED_AFTER


@dataclass(slots=True)
class Queue:
    """The waiting candidates by the key of their event. A newer event of the same key replaces an older one."""

    waiting: dict[str, Queued] = field(default_factory=dict)

    def put(self, event: Event, source: Source) -> None:
        """Adds an event, or replaces the one of the same key: the files have changed since."""
        self.waiting[event.key] = Queued(event, source)

    def ordered(self) -> list[Queued]:
        """All of them in the order in which they are taken if all are due: by time of modification, then by key."""
        return sorted(self.waiting.values(), key=lambda queued: (queued.event.order, queued.event.key))

    def take(self, now: float) -> Queued | None:
        """Removes and returns the first that is due; None if none is."""
        for found in self.ordered():
            if found.due <= now:
                return self.waiting.pop(found.event.key)
        return None

    def again(self, failed: Queued, now: float, after: float = 0.0) -> float:
        """Puts back one that failed because of its environment, unless a newer event of its key came meanwhile.

        Returns the seconds until it is due, at least the `after` seconds that a server asked for.
        """
        failed.attempt += 1
        delay = retry_delay(failed.attempt, after, parks=failed.source.parks)
        failed.due = now + delay
        self.waiting.setdefault(failed.event.key, failed)
        return delay

    def next_due(self) -> float | None:
        """The time at which the next one is due; None if nothing waits."""
        return min((queued.due for queued in self.waiting.values()), default=None)
