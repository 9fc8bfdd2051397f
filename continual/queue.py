"""The candidates waiting to be looked at, in a deterministic order, and when one that failed comes again. Pure; the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from continual.records import Event

FIRST_RETRY, LONGEST_RETRY = 5.0, 300.0


def retry_delay(attempt: int) -> float:
    """Seconds to wait after the `attempt`-th failure (from 1): doubling from five seconds to five minutes."""
    return min(FIRST_RETRY * 2.0 ** min(attempt - 1, 16), LONGEST_RETRY)


@dataclass(slots=True)
class Waiting:
    """An event in the queue. `root` is the watched folder it came from, `due` the time before which it is not looked at."""

    event: Event
    root: Path
    attempt: int = 0
    due: float = 0.0


@dataclass(slots=True)
class Queue:
    """Waiting candidates by path; a newer event for a path replaces the older one."""

    waiting: dict[Path, Waiting] = field(default_factory=dict)

    def put(self, event: Event, root: Path) -> None:
        """Adds an event, or replaces the one for the same path: its files have changed since."""
        self.waiting[event.path] = Waiting(event, root)

    def ordered(self) -> list[Waiting]:
        """All of them in the order in which they will be looked at if all are due: modification time, then name."""
        return sorted(self.waiting.values(), key=lambda w: (w.event.order, str(w.event.path)))

    def take(self, now: float) -> Waiting | None:
        """Removes and returns the first that is due, None if none is."""
        for found in self.ordered():
            if found.due <= now:
                return self.waiting.pop(found.event.path)
        return None

    def again(self, failed: Waiting, now: float) -> float:
        """Puts one back that met trouble in its environment, unless a newer event for its path came meanwhile; returns the delay in seconds."""
        failed.attempt += 1
        delay = retry_delay(failed.attempt)
        failed.due = now + delay
        self.waiting.setdefault(failed.event.path, failed)
        return delay

    def next_due(self) -> float | None:
        """When the next one is due, None if nothing waits."""
        return min((w.due for w in self.waiting.values()), default=None)
