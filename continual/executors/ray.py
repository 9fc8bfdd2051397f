"""Orders on the workers of a Ray cluster that is there already (https://docs.ray.io/en/latest/ray-core). A child
of this process is the driver (`links`): it has to run on a machine of the cluster. What is no piece of a job runs on
threads of this process.

No array travels: a worker is sent a job once, and names; it gives receipts back. An order that a worker took with it
when it died is sent out again, here and not by Ray, so that it is known how many were (`sending`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from continual.errors import Abandoned, Misconfigured
from continual.executors.cluster_figures import FIGURES, told
from continual.executors.contract import Task
from continual.executors.links import ClusterLink, link_to, must_be_head
from continual.executors.local import Local
from continual.executors.orders import groups, order_of
from continual.executors.patience import cores, total
from continual.executors.sending import Sending, SendLimits

T = TypeVar("T")
ORDER = 256 << 20
"""Bytes that an order reads, about."""
_log = logging.getLogger("continual.executors")


class RayAsked(NamedTuple):
    """Which cluster, and what an order asks of it. `memory`: bytes that it reserves; None: what its largest piece
    takes. `gpus`: the share of a GPU, or how many. `tries`: how often one is sent out again whose worker died, or that
    its machine could not do. `workers`: orders at a time at most; 0: one for each core of the cluster. `seconds`: for
    which a machine may work on one; None: by what others took."""

    address: str = "auto"
    memory: int | None = None
    gpus: float = 0.0
    tries: int = 3
    workers: int = 0
    order: int = ORDER
    seconds: float | None = None


class OnRay:
    """An executor of orders on a Ray cluster."""

    def __init__(self, asked: RayAsked, local: Local, stopping: threading.Event) -> None:
        """`local` runs what other processes cannot do. Nothing is asked of the cluster before there is work for it.
        Raises Misconfigured for an address that is no cluster's."""
        if "://" in asked.address:
            raise Misconfigured(
                f"ray.address = {asked.address}: continual is the driver and has to run on a machine of the cluster, "
                "not as a Ray Client: write it as HOST:PORT or auto, and start it there, or with 'ray job submit'"
            )
        must_be_head("ray.address", asked.address)
        self._asked = asked
        self._local = local
        self._stopping = stopping
        self.elsewhere = "cuda" if asked.gpus else "cpu"

    @property
    def workers(self) -> int:
        """Orders at a time at most: the setting, or one for each core of the cluster."""
        return self._asked.workers or cores(self._linked())

    @property
    def budget(self) -> int:
        """Bytes that orders may reserve on all machines together."""
        return int(total(self._linked(), "memory")) or self._local.budget

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Runs the tasks, as `Executor` says; results come order by order. Raises Abandoned where continual is
        stopping, Misconfigured where Ray is not installed, Retry where there is no cluster, where it goes away, has no
        machine for an order, or where workers died too often; the error of an order that no machine could do."""
        waiting: list[list[Task[T]]] = []
        here: list[Task[T]] = []
        for group in groups(tasks, self._asked.order):
            if order_of(group) is None:
                here += group
            else:
                waiting.append(group)
        if here:
            _log.info("on this machine and not on the cluster: %d tasks, the first is %s", len(here), here[0].name)
            yield from self._local.map(here)
        if waiting:
            yield from self._drive(waiting)

    def _drive(self, waiting: Sequence[Sequence[Task[T]]]) -> Iterator[tuple[str, T]]:
        asked, link = self._asked, self._linked()
        limits = SendLimits(asked.workers, asked.tries, asked.seconds)
        with link.used(), FIGURES.driving(len(waiting)) as driven:
            yield from Sending[T](link, limits, partial(self._options, link), driven, self._go_on).run(waiting)
        _log.info("%s", told(driven))

    def _go_on(self) -> None:
        """Raises Abandoned where continual is stopping."""
        if self._stopping.is_set():
            raise Abandoned(
                "the work was given up because continual is stopping; it will be taken up at the next start"
            )

    def _options(self, link: ClusterLink, group: Sequence[Task[T]]) -> dict[str, Any]:
        """What Ray is told of an order."""
        need = max(task.need for task in group)
        largest = max((int(node["Resources"].get("memory", 0)) for node in link.nodes), default=0)
        return {
            "num_cpus": 1,
            "num_gpus": self._asked.gpus,
            "memory": self._asked.memory or min(need, largest),
            "max_retries": 0,
            "scheduling_strategy": "SPREAD",
            "name": f"continual {group[0].name}",
        }

    def _linked(self) -> ClusterLink:
        return link_to(self._asked.address, self._go_on)
