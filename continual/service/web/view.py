"""What the service shows, as one frozen record, and where it gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from continual.texts import Json


@dataclass(frozen=True, slots=True)
class Status:
    """The state and, where one runs, its daemon. Sizes in bytes, times as RFC 3339 or seconds. `current` is the
    candidate being folded, with its stage; `select` says who chooses what is folded, `pool` has the newest of the
    `pool_size` candidates that wait for a round, `last_round` the figures of the last; `queue` has the first of the
    `queued` candidates that are to be looked at; `hub` says what is taken from the Hub (`bases`), when it was `polled`,
    what `problem` that had and how many commits were `seen` there and are open; `published` are the last releases and
    hooks; `tuned` has the `record` that chose the scale and how many `folds` there were then, where the scale in force
    was tuned."""

    version: str
    health: str
    why: str
    pid: int | None
    url: str | None
    uptime_seconds: float | None
    state: str
    state_id: str
    base: str
    rule: str
    options: Mapping[str, Any]
    scale: str
    tuned: Mapping[str, int] | None
    watch: Sequence[str]
    hub: Mapping[str, Any] | None
    head: int
    folds: int
    generations: int
    state_bytes: int
    disk_free_bytes: int
    totals: Mapping[str, float]
    gauges: Mapping[str, float]
    queue: Sequence[str]
    queued: int
    select: str
    pool_size: int
    pool: Sequence[Mapping[str, Any]]
    last_round: Mapping[str, Any] | None
    current: Mapping[str, Any] | None
    last_folds: Sequence[Mapping[str, Any]]
    refusals: Sequence[Mapping[str, Any]]
    published: Sequence[Mapping[str, Any]]
    peak_memory_bytes: float | None


class View(Protocol):
    """What the app asks of the daemon."""

    def status(self) -> Status:
        """Everything there is to show."""
        ...

    def healthy(self) -> tuple[bool, str]:
        """Whether the daemon is alive, and why not."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether it has opened its state and scanned its folders once, and why not."""
        ...

    def log(self, limit: int, before: int | None) -> list[dict[str, Json]]:
        """The newest `limit` records, or those before record `before`, oldest first."""
        ...
