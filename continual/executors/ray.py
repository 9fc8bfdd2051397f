"""Orders on the workers of a Ray cluster that is there already (https://docs.ray.io/en/latest/ray-core). This process
is the driver: it has to run on a machine of the cluster. What is no piece of a job runs on threads of this process.

No array travels: a worker is sent a job once, and names; it gives receipts back. An order that a worker took with it
when it died is sent out again, here and not by Ray, so that it is known how many were.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from platform import python_version
from typing import Any, NamedTuple, TypeVar

from continual.errors import Abandoned, Misconfigured, Retry
from continual.executors.cluster_figures import FIGURES, DrivenWork, nodes_of, told
from continual.executors.contract import Task
from continual.executors.local import Local, give_back_large_blocks
from continual.executors.orders import WorkJob, WorkOrder, groups, order_of, work
from continual.lazily import torch

T = TypeVar("T")
ORDER = 256 << 20
"""Bytes that an order reads, about."""
_REACHED = 10.0
"""Seconds in which the head of a cluster answers."""
_START = "start one with 'ray start --head', or join one with 'ray start --address HOST:PORT'"
_LOOK = 0.5
"""Seconds after which it is looked whether to stop."""
_NODES = 5.0
"""Seconds after which it is asked again which machines there are."""
_SIGACTION = 512
"""Bytes that have room for a `struct sigaction` of any C library."""
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


class WorkAnswer(NamedTuple):
    """What a worker gives back of an order: a result of each piece, or the error that ended it; where it runs, and the
    seconds that it took."""

    results: Sequence[object]
    error: Exception | None
    machine: str
    seconds: float


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
        self._asked = asked
        self._local = local
        self._stopping = stopping
        self._looked = -math.inf
        self._largest = 0
        self._answered = threading.Event()
        self._asking: threading.Thread | None = None
        self.elsewhere = "cuda" if asked.gpus else "cpu"

    @property
    def workers(self) -> int:
        """Orders at a time at most: the setting, or one for each core of the cluster."""
        return self._asked.workers or max(1, int(self._cluster().get("CPU", 1)))

    @property
    def budget(self) -> int:
        """Bytes that orders may reserve on all machines together."""
        return int(self._cluster().get("memory", self._local.budget))

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Runs the tasks, as `Executor` says; results come order by order. Raises Abandoned where continual is
        stopping, Misconfigured where there is no cluster, Retry where workers died too often."""
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
        ray = self._connected()
        most = self._asked.workers or 2 * self.workers
        jobs: dict[str, Any] = {}
        running: dict[Any, list[Task[T]]] = {}
        try:
            while waiting or running:
                self._look(ray)
                while waiting and len(running) < most:
                    group = waiting.popleft()
                    running[self._sent(group, jobs)] = group
                    driven.sent(group[0].name, len(group))
                done, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK)
                self._go_on()
                for ref in done:
                    group = running.pop(ref)
                    try:
                        answer: WorkAnswer = ray.get(ref)
                    except ray.exceptions.RayTaskError:
                        raise
                    except ray.exceptions.RayError as error:
                        self._again(group, driven, error)
                        waiting.appendleft(group)
                        continue
                    driven.came(group[0].name, answer.machine, sum(task.reads for task in group), answer.seconds)
                    yield from _received(answer, group)
        finally:
            _end(ray, list(running))

    def _again(self, group: Sequence[Task[T]], driven: DrivenWork, error: Exception) -> None:
        """Counts an order that was lost with its worker. Raises Retry where that was too often."""
        name = group[0].name
        times = driven.was_lost(name)
        why = str(error).strip().partition("\n")[0]
        if times > self._asked.tries:
            raise Retry(f"the order that begins with {name} lost its worker {times} times ({why}); nothing was settled")
        _log.warning("a worker died, and its order that begins with %s is sent out again: %s", name, why)

    def _look(self, ray: Any) -> None:
        """Has it asked again and again which machines there are, on a thread of its own: a cluster that is gone may not
        answer. Waits for the first answer. Raises Abandoned."""
        while True:
            if time.monotonic() >= self._looked + _NODES and (self._asking is None or not self._asking.is_alive()):
                self._looked = time.monotonic()
                self._asking = threading.Thread(target=self._ask, args=(ray,), name="ray-nodes", daemon=True)
                self._asking.start()
            if self._answered.wait(_LOOK):
                return
            self._go_on()

    def _ask(self, ray: Any) -> None:
        try:
            found = ray.nodes()
        except Exception as error:  # the orders that are out say whether it matters
            _log.warning("the cluster at %s does not say which machines it has: %s", self._asked.address, error)
            return
        alive = [node["Resources"] for node in found if node["Alive"]]
        self._largest = int(max((has.get("memory", 0) for has in alive), default=0))
        FIGURES.answered(self._asked.address, nodes_of(found))
        self._answered.set()

    def _go_on(self) -> None:
        """Raises Abandoned where continual is stopping."""
        if self._stopping.is_set():
            raise Abandoned(
                "the work was given up because continual is stopping; it will be taken up at the next start"
            )

    def _sent(self, group: Sequence[Task[T]], jobs: dict[str, Any]) -> Any:
        """Sends an order out; `jobs` has the jobs that were."""
        ray = self._connected()
        order = order_of(group)
        assert order is not None
        if order.job.id not in jobs:
            jobs[order.job.id] = ray.put(order.job)
        need = max(task.need for task in group)
        options = {
            "num_cpus": 1,
            "num_gpus": self._asked.gpus,
            "memory": self._asked.memory or min(need, self._largest),
            "max_retries": 0,
            "scheduling_strategy": "SPREAD",
            "name": f"continual {group[0].name}",
        }
        return ray.remote(_done).options(**options).remote(jobs[order.job.id], order.names, _versions())

    def _cluster(self) -> Mapping[str, float]:
        found: Mapping[str, float] = self._connected().cluster_resources()
        return found

    def _connected(self) -> Any:
        return _driver(self._asked.address)


def _received(answer: WorkAnswer, group: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
    """The results of an order, by name. Raises its error."""
    if answer.error is not None:
        raise answer.error
    for task, result in zip(group, answer.results, strict=True):
        yield task.name, result  # type: ignore[misc]


def _done(job: WorkJob[Any], names: tuple[str, ...], versions: Mapping[str, str]) -> WorkAnswer:
    """Does an order, on a worker."""
    began = time.perf_counter()
    machine = _machine()
    torch.set_num_threads(1)
    give_back_large_blocks()
    try:
        _same_software(machine, versions)
        return WorkAnswer(work(WorkOrder(job, names)), None, machine, time.perf_counter() - began)
    except Exception as error:
        error.add_note(f"on the worker {machine}:\n{''.join(traceback.format_tb(error.__traceback__))}")
        return WorkAnswer((), error, machine, time.perf_counter() - began)


def _machine() -> str:
    """The address of this machine in the cluster."""
    from ray import util

    return str(util.get_node_ip_address())  # type: ignore[no-untyped-call, unused-ignore]


def _versions() -> dict[str, str]:
    return {"python": python_version(), **{name: version(name) for name in ("continual", "torch", "numpy")}}


def _same_software(machine: str, wanted: Mapping[str, str]) -> None:
    """Raises Misconfigured where this machine has other versions: they may give other bits."""
    for name, here in _versions().items():
        if here != wanted[name]:
            raise Misconfigured(
                f"the worker {machine} has {name} {here}, and the driver {wanted[name]}: "
                "install the same on every machine"
            )


def _end(ray: Any, running: list[Any]) -> None:
    """Has orders end that nobody waits for any more, and waits until they have."""
    for ref in running:
        ray.cancel(ref, force=True)
    if running:
        ray.wait(running, num_returns=len(running), timeout=60.0)


_CONNECTING = threading.Lock()
_CONNECTED: list[str] = []
"""The address of the cluster of which this process is a driver, if it is one."""


def _driver(address: str) -> Any:
    """Ray, with this process as a driver of the cluster. Raises Misconfigured where it is not installed, where there is
    no cluster, or where this process is a driver of another one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise Misconfigured("executor = ray needs the package ray: pip install 'continual[ray]'") from None
    with _CONNECTING:
        if not ray.is_initialized():
            _connect(ray, address)
            _CONNECTED[:] = [address]
        elif _CONNECTED and [address] != _CONNECTED:
            _reached(address)
            raise Misconfigured(
                f"ray.address = {address}: this process is a driver of the cluster at {_CONNECTED[0]} already: "
                "start another process for another cluster"
            )
    return ray


def _reached(address: str) -> None:
    """Raises Misconfigured where nobody listens at an address of the form HOST:PORT: Ray itself would wait for
    minutes."""
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACHED).close()
        except OSError as error:
            raise Misconfigured(f"ray.address = {address}: nobody listens there ({error}); {_START}") from error


def _connect(ray: Any, address: str) -> None:
    _reached(address)
    try:
        with _signals_kept():
            ray.init(address, namespace="continual", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Misconfigured(
            f"ray.address = {address}: no Ray cluster is there that this machine belongs to ({error}); {_START}; one "
            "that has a token wants RAY_AUTH_MODE=token and the same token here"
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Has the handlers of before back at its end, in whichever thread. Ray sets its own, in Python where it can and
    always below it: that one aborts the process three seconds after a SIGTERM, while continual drains."""
    libc = ctypes.CDLL(None)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    below = {one: ctypes.create_string_buffer(_SIGACTION) for one in handlers}
    for one, action in below.items():
        libc.sigaction(one.value, None, action)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for one, handler in handlers.items():
                signal.signal(one, handler)
        for one, action in below.items():
            libc.sigaction(one.value, action, None)
