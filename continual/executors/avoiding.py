"""Which machines of a cluster are given no orders for a while, since they could not do what others can: a full disk, a
folder that is not there, other software. Nobody waits for one of them; when its time is over it gets orders again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Set
from typing import NamedTuple

from continual.retrying import avoided_for


class NodeAvoided(NamedTuple):
    """A machine that is given no orders: why, since when and until when (seconds since 1970), under which ids Ray knows
    it, and for the how-manieth time in a row."""

    why: str
    since: float
    until: float
    ids: frozenset[str]
    times: int

    def lasts(self, now: float) -> bool:
        """Whether it is avoided at this time. A clock that was set back does not make it longer."""
        return self.since <= now < self.until


class AvoidedNodes:
    """The machines of each cluster that are avoided, by the cluster's address and theirs. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` tells seconds since 1970."""
        self._clock = clock
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, NodeAvoided]] = {}

    def now(self, cluster: str) -> dict[str, NodeAvoided]:
        """Those that are avoided at this moment."""
        with self._lock:
            of = self._found.get(cluster)
            now = self._clock() if of else 0.0
            return {name: one for name, one in of.items() if one.lasts(now)} if of else {}

    def avoid(self, cluster: str, machine: str, ids: Iterable[str], why: str) -> float:
        """A machine, which Ray knows under these ids, could not do what others may; for how many seconds it is avoided,
        0 where it is already. The more often in a row, the longer."""
        now = self._clock()
        with self._lock:
            of = self._found.setdefault(cluster, {})
            before = of.get(machine)
            if before is not None and before.lasts(now):  # it had several orders at a time
                return 0.0
            times = 1 if before is None else before.times + 1
            seconds = avoided_for(times)
            of[machine] = NodeAvoided(why, now, now + seconds, frozenset(ids), times)
            return seconds

    def forgive(self, cluster: str, machines: Iterable[str]) -> None:
        """It was not these machines."""
        with self._lock:
            for machine in machines:
                self._found.get(cluster, {}).pop(machine, None)

    def works(self, cluster: str, machine: str) -> None:
        """A machine did an order. Where its time was over, nothing is held against it any more."""
        now = self._clock()
        with self._lock:
            before = self._found.get(cluster, {}).get(machine)
            if before is not None and not before.lasts(now):
                del self._found[cluster][machine]

    def there(self, cluster: str, ids: Set[str]) -> None:
        """Under these ids Ray knows the nodes that are alive. One that was started anew has another id, and a chance:
        somebody may have mended it."""
        with self._lock:
            of = self._found.get(cluster, {})
            for machine in [name for name, one in of.items() if not one.ids & ids]:
                del of[machine]
