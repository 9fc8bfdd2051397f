"""Orders on the workers of a Ray cluster that is there already (https://docs.ray.io/en/latest/ray-core). A child
of this process is the driver (`links`): it has to run on a machine of the cluster. What is no piece of a job runs on
threads of this process.

No array travels: a worker is sent a job once, and names; it gives receipts back. An order that a worker took with it
when it died is sent out again, here and not by Ray, so that it is known how many were.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from continual.errors import Abandoned, Misconfigured, Retry
from continual.executors.away import WorkAnswer, software
from continual.executors.cluster_figures import FIGURES, DrivenWork, told
from continual.executors.contract import Task
from continual.executors.driving import Came
from continual.executors.links import SILENT, Answers, ClusterLink, link_to, must_be_head
from continual.executors.local import Local
from continual.executors.orders import groups, order_of
from continual.outside import counted

T = TypeVar("T")
ORDER = 256 << 20
"""Bytes that an order reads, about."""
LOOK = 0.5
"""Seconds after which it is looked whether to stop."""
QUIET = 20.0
"""Seconds without an answer after which the log says what is waited for; then after twice as many, and so on."""
ROOM_SAID = 5.0
"""Seconds after which it says that no machine can do an order."""
NO_ROOM = 600.0
"""Seconds for which it is waited that a machine comes that can do an order at all: a cluster that grows by itself takes
minutes."""
_log = logging.getLogger("continual.executors")


class RayAsked(NamedTuple):
    """Which cluster, and what an order asks of it. `memory`: bytes that it reserves; None: what its largest piece
    takes. `gpus`: the share of a GPU, or how many. `tries`: how often one is sent out again whose worker died.
    `workers`: orders at a time at most; 0: one for each core of the cluster."""

    address: str = "auto"
    memory: int | None = None
    gpus: float = 0.0
    tries: int = 3
    workers: int = 0
    order: int = ORDER


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
        return self._asked.workers or _cores(self._linked())

    @property
    def budget(self) -> int:
        """Bytes that orders may reserve on all machines together."""
        return int(_total(self._linked(), "memory")) or self._local.budget

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Runs the tasks, as `Executor` says; results come order by order. Raises Abandoned where continual is
        stopping, Misconfigured where Ray is not installed, Retry where there is no cluster, where it goes away, has no
        machine for an order, or where workers died too often."""
        waiting: deque[list[Task[T]]] = deque()
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

    def _drive(self, waiting: deque[list[Task[T]]]) -> Iterator[tuple[str, T]]:
        with FIGURES.driving(len(waiting)) as driven:
            yield from self._driven(waiting, driven)
        _log.info("%s", told(driven))

    def _driven(self, waiting: deque[list[Task[T]]], driven: DrivenWork) -> Iterator[tuple[str, T]]:
        link = self._linked()
        answers, running, jobs = Answers(), dict[int, list[Task[T]]](), set[str]()
        patience = Patience()
        try:
            while waiting or running:
                while waiting and len(running) < (self._asked.workers or 2 * _cores(link)):
                    group = waiting.popleft()
                    running[self._sent(link, group, jobs, answers)] = group
                    driven.sent(group[0].name, len(group))
                try:
                    came = answers.get(timeout=LOOK)
                except queue.Empty:
                    self._go_on()
                    oldest = next(iter(running.values()))
                    patience.look(link, len(running), self._options(link, oldest))
                    continue
                self._go_on()
                patience.renew()
                if came is None:
                    running.clear()
                    raise link.gone()
                group = running.pop(came.number)
                if came.answer is None:
                    self._again(group, driven, came)
                    waiting.appendleft(group)
                    continue
                answer: WorkAnswer = pickle.loads(came.answer)
                driven.came(group[0].name, answer.machine, sum(task.reads for task in group), answer.seconds)
                yield from _received(answer, group)
        finally:
            link.end(list(running), answers)
            for job in jobs:
                link.job(job, None)

    def _again(self, group: Sequence[Task[T]], driven: DrivenWork, came: Came) -> None:
        """Counts an order that was lost with its worker. Raises Retry where that was too often, or where the
        worker cannot do orders at all."""
        name = group[0].name
        if not came.lost:
            raise Retry(
                f"a worker of the cluster cannot do the order that begins with {name} ({came.why}): "
                "is continual installed on every machine, in the same version? Nothing was settled"
            )
        times, why = driven.was_lost(name), _died(came.why)
        if times > self._asked.tries:
            raise Retry(f"the order that begins with {name} lost its worker {times} times ({why}); nothing was settled")
        _log.warning("a worker died, and its order that begins with %s is sent out again: %s", name, why)

    def _go_on(self) -> None:
        """Raises Abandoned where continual is stopping."""
        if self._stopping.is_set():
            raise Abandoned(
                "the work was given up because continual is stopping; it will be taken up at the next start"
            )

    def _sent(self, link: ClusterLink, group: Sequence[Task[T]], jobs: set[str], answers: Answers) -> int:
        """Sends an order out, and its job before the first one; `jobs` has the jobs that were. The order's number."""
        order = order_of(group)
        assert order is not None
        job = order.job.id
        if job not in jobs:
            link.job(job, pickle.dumps(order.job))
            jobs.add(job)
        return link.order(job, order.names, (software(), self._options(link, group)), answers)

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


class Patience:
    """How long it was waited for an answer, and what is said about it. `clock` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.renew()

    def renew(self) -> None:
        """Something came."""
        self._since, self._next = self._clock(), QUIET

    def look(self, link: ClusterLink, out: int, options: Mapping[str, Any]) -> None:
        """Says in the log, more and more rarely, what is waited for: `out` orders, of which the oldest has these
        options. Raises Retry where no machine can do it for a long time."""
        waited = self._clock() - self._since
        room = any(_fits(node["Resources"], options) for node in link.nodes)
        if not room and waited > NO_ROOM:
            raise Retry(f"{_no_room(link, options)}; nothing was settled")
        if waited < self._next and (room or waited < ROOM_SAID or self._next > QUIET):
            return
        self._next = max(2 * waited, QUIET + 1)
        quiet = f"{counted(out, 'order')} out, none came back for {waited:.0f} s"
        if link.silent > SILENT:
            _log.warning("%s: the cluster at %s has not answered for %.0f s", quiet, link.address, link.silent)
        elif not room:
            _log.warning("%s: %s", quiet, _no_room(link, options))
        else:
            _log.info(
                "%s: %s alive; others may have their cores. A process 'ray::%s' that hangs can be killed",
                quiet,
                counted(len(link.nodes), "machine"),
                options["name"],
            )


def _died(why: str) -> str:
    """What Ray says of a worker that died, and what to do where memory was the reason."""
    advice = "; set ray.memory higher, so that fewer orders run on a machine at a time"
    return why + advice if "OutOfMemory" in why else why


def _fits(has: Mapping[str, float], options: Mapping[str, Any]) -> bool:
    asked = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options["memory"]}
    return all(has.get(name, 0) >= least for name, least in asked.items())


def _no_room(link: ClusterLink, options: Mapping[str, Any]) -> str:
    gpus = f", {options['num_gpus']:g} GPU" if options["num_gpus"] else ""
    return (
        f"no machine of the cluster at {link.address} has what an order reserves (1 core{gpus} and "
        f"{options['memory'] / 1e9:.2f} GB of memory): it has {counted(len(link.nodes), 'machine')} with "
        f"{_total(link, 'CPU'):g} cores and {_total(link, 'GPU'):g} GPUs in all; look at ray.gpus and ray.memory, or "
        "let a machine join"
    )


def _total(link: ClusterLink, name: str) -> float:
    return float(sum(node["Resources"].get(name, 0) for node in link.nodes))


def _cores(link: ClusterLink) -> int:
    return max(1, int(_total(link, "CPU")))


def _received(answer: WorkAnswer, group: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
    """The results of an order, by name. Raises its error."""
    if answer.error is not None:
        raise answer.error
    for task, result in zip(group, answer.results, strict=True):
        yield task.name, result  # type: ignore[misc]
