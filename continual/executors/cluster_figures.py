"""What this process had done on a cluster, and which machines the cluster had when it last answered. The threads that
drive orders write it; the page, the metrics and the log read it and never ask the cluster: one that is gone may not
answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from continual.executors.avoiding import AvoidedNodes, NodeAvoided
from continual.outside import counted

LABELS = 64
"""Machines that have a label of their own, for as long as this process runs. What further ones do counts as `OTHERS`:
where machines come and go, the number of labels stays bounded, and no count goes back."""
OTHERS = "other"
WORKED = 256
"""Machines whose work is told of by itself. Beyond that it is added up as `gone`, first of those that are."""
_TOLD = 12
"""Machines that a log line names."""


class WorkDone(NamedTuple):
    """Orders that were done, the bytes that they read, and the seconds that they took."""

    orders: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def plus(self, more: WorkDone) -> WorkDone:
        """Both together."""
        return WorkDone(self.orders + more.orders, self.nbytes + more.nbytes, self.seconds + more.seconds)


class NodeSeen(NamedTuple):
    """A machine as the cluster tells of it: whether it is alive, the cores, bytes of memory and GPUs that it has for
    orders, and under which ids Ray knows it while it is alive."""

    alive: bool
    cores: float = 0.0
    memory: int = 0
    gpus: float = 0.0
    ids: tuple[str, ...] = ()


class NodeWork(NamedTuple):
    """What a machine did, when it last gave an order back (seconds since 1970), and with which tensor that began."""

    done: WorkDone
    heard: float
    last: str


class OutOrder(NamedTuple):
    """An order that is out: the tensor with which it begins, how many tensors it has, since when (seconds since 1970),
    and how often it was lost before; `machine`: the address of the one that works on it, since the time `began` (None:
    it waits for a core)."""

    first: str
    pieces: int
    since: float
    lost: int
    machine: str = ""
    began: float | None = None


class ClusterSeen(NamedTuple):
    """All of it at one moment, which nobody changes any more.

    `address`: of the setting; `answered`: when the cluster last said which `nodes` it has, by address (seconds since
    1970; None: never); `parted`: when its driver ended, if none was there since. `work`: by address, of machines that
    are there or not; `gone`: of further ones together; `labelled`: all of it by label, for metrics; `lost`: orders that
    were lost with a worker; `failed`: those that a machine could not do, and another was asked; `avoided`: machines
    that are given none for a while, by address. `since`: when the work under way began (None: there is none), of which
    `done` of `total` orders came back and `out` are under way, the oldest first.
    """

    address: str = ""
    answered: float | None = None
    parted: float | None = None
    nodes: Mapping[str, NodeSeen] = {}
    work: Mapping[str, NodeWork] = {}
    gone: WorkDone = WorkDone()
    labelled: Mapping[str, WorkDone] = {}
    lost: int = 0
    failed: int = 0
    avoided: Mapping[str, NodeAvoided] = {}
    since: float | None = None
    done: int = 0
    total: int = 0
    out: tuple[OutOrder, ...] = ()

    @property
    def all(self) -> WorkDone:
        """What all machines did together."""
        found = WorkDone()
        for one in self.labelled.values():
            found = found.plus(one)
        return found


class RayFigures:
    """Counts what a process has a cluster do. From any thread; nothing waits while the lock is held."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since 1970."""
        self.clock = clock
        self._lock = threading.Lock()
        self.avoided = AvoidedNodes(clock)
        self._seen = ClusterSeen()
        self._clusters: dict[str, ClusterSeen] = {}
        self._work: dict[str, NodeWork] = {}
        self._labelled: dict[str, WorkDone] = {OTHERS: WorkDone()}
        self._driven: list[DrivenWork] = []

    def seen(self, address: str = "") -> ClusterSeen:
        """All of it as it is now, with the machines of the cluster at `address` (none: of no cluster)."""
        with self._lock:
            driven, cluster = self._driven, self._clusters.get(address, ClusterSeen(address))
            return cluster._replace(
                gone=self._seen.gone,
                lost=self._seen.lost,
                failed=self._seen.failed,
                avoided=self.avoided.now(address),
                work=dict(self._work),
                labelled=dict(self._labelled),
                since=min((one.since for one in driven), default=None),
                done=sum(one.done for one in driven),
                total=sum(one.total for one in driven),
                out=tuple(sorted((out for one in driven for out in one.out.values()), key=lambda out: out.since)),
            )

    @property
    def is_driving(self) -> bool:
        """Whether work is under way."""
        return bool(self._driven)

    def answered(self, address: str, nodes: Mapping[str, NodeSeen]) -> None:
        """The cluster at an address said which machines it has. Of those that are gone only who worked for this process
        is kept."""
        with self._lock:
            kept = {name: node for name, node in nodes.items() if node.alive or name in self._work}
            self._clusters[address] = ClusterSeen(address, self.clock(), nodes=kept)
        self.avoided.there(address, {one for node in nodes.values() for one in node.ids})

    def parted(self, address: str) -> None:
        """The driver of the cluster at an address has ended: nobody is connected with it before there is work for it
        again."""
        with self._lock:
            before = self._clusters.get(address, ClusterSeen(address))
            self._clusters[address] = before._replace(parted=self.clock())

    @contextmanager
    def driving(self, total: int) -> Iterator[DrivenWork]:
        """Work of so many orders, while it lasts."""
        driven = DrivenWork(self, total)
        with self._lock:
            self._driven.append(driven)
        try:
            yield driven
        finally:
            with self._lock:
                self._driven.remove(driven)

    def _add(self, address: str, first: str, done: WorkDone) -> None:
        """Adds to the counts; the lock is held."""
        label = address if address in self._labelled or len(self._labelled) <= LABELS else OTHERS
        self._labelled[label] = self._labelled.get(label, WorkDone()).plus(done)
        before = self._work.get(address)
        if before is None and len(self._work) >= WORKED:
            self._forget()
        self._work[address] = NodeWork(done if before is None else before.done.plus(done), self.clock(), first)

    def _forget(self) -> None:
        """Adds up the work of the machine that was not heard of for the longest, of those that are not alive first."""
        alive = {name for one in self._clusters.values() for name, node in one.nodes.items() if node.alive}
        name = min(self._work, key=lambda one: (one in alive, self._work[one].heard))
        self._seen = self._seen._replace(gone=self._seen.gone.plus(self._work.pop(name).done))


class DrivenWork:
    """Orders that belong together, `total` of them, begun at the time `since`; `done` of them came back, and `out` are
    under way. `machines`: who did how much of it; `lost`: how often an order was lost; `elsewhere`: how often a machine
    could not do one. Written by one thread."""

    def __init__(self, figures: RayFigures, total: int) -> None:
        self._figures = figures
        self._times: dict[str, int] = {}
        self.since = figures.clock()
        self.total = total
        self.done = 0
        self.lost = 0
        self.elsewhere = 0
        self.out: dict[str, OutOrder] = {}
        self.machines: dict[str, WorkDone] = {}

    def sent(self, first: str, pieces: int) -> None:
        """The order that begins with the tensor `first` is out."""
        order = OutOrder(first, pieces, self._figures.clock(), self._times.get(first, 0))
        with self._figures._lock:
            self.out[first] = order

    def began(self, first: str, machine: str) -> None:
        """The machine at an address works on it from now on."""
        with self._figures._lock:
            self.out[first] = self.out[first]._replace(machine=machine, began=self._figures.clock())

    def came(self, first: str, address: str, nbytes: int, seconds: float) -> None:
        """It came back from the machine at an address, having read so many bytes in so many seconds."""
        done = WorkDone(1, nbytes, seconds)
        with self._figures._lock:
            del self.out[first]
            self.done += 1
            self.machines[address] = self.machines.get(address, WorkDone()).plus(done)
            self._figures._add(address, first, done)

    def was_lost(self, first: str) -> int:
        """It was lost with its worker; how often by now."""
        figures = self._figures
        self._times[first] = self._times.get(first, 0) + 1
        with figures._lock:
            del self.out[first]
            self.lost += 1
            figures._seen = figures._seen._replace(lost=figures._seen.lost + 1)
        return self._times[first]

    def failed(self, first: str) -> None:
        """A machine could not do it, and another is asked."""
        figures = self._figures
        with figures._lock:
            del self.out[first]
            self.elsewhere += 1
            figures._seen = figures._seen._replace(failed=figures._seen.failed + 1)


FIGURES = RayFigures()
"""Of all orders of this process."""


def nodes_of(found: Sequence[Mapping[str, Any]]) -> dict[str, NodeSeen]:
    """The machines by their addresses, as `ray.nodes()` of Ray tells of them; several nodes of one machine, also those
    that were there before, together."""
    nodes: dict[str, NodeSeen] = {}
    for one in found:
        name, has = str(one["NodeManagerAddress"]), one["Resources"] if one["Alive"] else {}
        before = nodes.get(name, NodeSeen(alive=False))
        nodes[name] = NodeSeen(
            before.alive or one["Alive"],
            before.cores + has.get("CPU", 0.0),
            before.memory + int(has.get("memory", 0)),
            before.gpus + has.get("GPU", 0.0),
            (*before.ids, str(one["NodeID"])) if one["Alive"] else before.ids,
        )
    return nodes


def told(driven: DrivenWork) -> str:
    """What a log line says of work that was done: which machine did how much of it."""
    machines = sorted(driven.machines.items(), key=lambda one: -one[1].seconds)
    said = [
        f"{name} did {counted(done.orders, 'order')} in {done.seconds:.1f} s and read {done.nbytes / 1e6:.0f} MB"
        for name, done in machines[:_TOLD]
    ]
    said += [f"{len(machines) - _TOLD} more machines did the rest"] if len(machines) > _TOLD else []
    said += [f"{counted(driven.lost, 'order')} lost with a worker and sent out again"] if driven.lost else []
    said += [f"{counted(driven.elsewhere, 'order')} sent to another machine"] if driven.elsewhere else []
    return f"{counted(driven.done, 'order')} done on the cluster: {'; '.join(said)}"
