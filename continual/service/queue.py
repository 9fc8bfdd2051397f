"""The candidates waiting to be looked at, in a deterministic order, and when one that failed comes again. Pure; the
clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from continual.records import Event
from continual.retrying import PARKED_AFTER, retry_delay


@dataclass(slots=True)
class Queued:
    """An event in the queue; it is not looked at before `due`, and failed `attempt` times so far."""

    event: Event
    attempt: int = 0
    due: float = 0.0

    @property
    def parked(self) -> bool:
        """Whether it failed so often that it comes again only from time to time."""
        return self.event.revision is not None and self.attempt > PARKED_AFTER


@dataclass(slots=True)
class Queue:
    """Queued candidates by place; a newer event of a place takes that of the older one."""

    waiting: dict[str, Queued] = field(default_factory=dict)

    def put(self, event: Event) -> None:
        """Adds an event, or replaces the one of the same place: its files have changed since."""
        self.waiting[event.key] = Queued(event)

    def ordered(self) -> list[Queued]:
        """All of them in the order in which they will be looked at if all are due: modification time, then name."""
        return sorted(self.waiting.values(), key=lambda w: (w.event.order, w.event.key))

    def take(self, now: float) -> Queued | None:
        """Removes and returns the first that is due, None if none is."""
        for found in self.ordered():
            if found.due <= now:
                return self.waiting.pop(found.event.key)
        return None

    def again(self, failed: Queued, now: float, after: float = 0.0) -> float:
        """Puts one back that met trouble in its environment, unless a newer event of its place came meanwhile; returns
        the delay in seconds.

        `after`: what a server asked to wait at least.
        """
        failed.attempt += 1
        delay = retry_delay(failed.attempt, after, parks=failed.event.revision is not None)
        failed.due = now + delay
        self.waiting.setdefault(failed.event.key, failed)
        return delay

    def next_due(self) -> float | None:
        """When the next one is due, None if nothing waits."""
        return min((w.due for w in self.waiting.values()), default=None)
