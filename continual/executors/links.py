"""Clusters that this process has work for, each through a driver of its own: a child process (`driving`). Whatever
Ray does to the driver when the cluster goes away, this process goes on, and connects anew when there is work again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from continual.errors import Misconfigured, Retry
from continual.executors.cluster_figures import FIGURES, nodes_of
from continual.executors.driving import Began, Came, Nodes, NotConnected, RayLoaded, SendJob, SendOrder, SendStop

REACHED = 10.0
"""Seconds in which the head of a cluster takes a connection."""
CONNECTED = 20.0
"""Seconds in which Ray connects, once it is loaded."""
LOADED = 90.0
"""Seconds in which Ray is loaded: a machine may be busy."""
SILENT = 15.0
"""Seconds after which a cluster that does not say which machines it has is called silent."""
ENDED = 60.0
"""Seconds in which orders end that nobody waits for any more."""
_LOOK = 0.2
_CODE = "import sys; from continual.executors.driving import main; main(int(sys.argv[1]), sys.argv[2])"
_START = "start one with 'ray start --head', or join one with 'ray start --address HOST:PORT'"
_TOKEN = "RAY_AUTH_MODE=token and the same token (RAY_AUTH_TOKEN, or ~/.ray/auth_token) here as on its machines"
_HEAD = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s/:\[\]]+):([0-9]{1,5})")
_log = logging.getLogger("continual.executors")
_OF_RAY = re.compile(r"\[[^]]* [IWEFC] \d+ \d+\] (?:\S+:\d+: )?(.+)")
_FRAME = re.compile(r"@ +0x|PC: |/\S+\(\S*\+0x")
"""A line of a trace of C++."""
GoOn = Callable[[], None]
"""Raises where it is no longer wanted."""


def must_be_head(name: str, address: str) -> None:
    """Raises Misconfigured where an address, of this name, is neither HOST:PORT nor `auto`. Ray takes `local` for a
    cluster that is to be started."""
    found = _HEAD.fullmatch(address)
    if address != "auto" and (found is None or not 0 < int(found[2]) < 1 << 16):
        raise Misconfigured(
            f"{name} = {address!r}: write HOST:PORT of the head of a cluster that is there, or auto; none is started"
        )


class ClusterLink:
    """A driver of the cluster at `address`, while it lives. Thread-safe."""

    def __init__(self, address: str, go_on: GoOn) -> None:
        """Raises Retry where there is no cluster, Misconfigured where Ray is not installed, and what `go_on` does."""
        if importlib.util.find_spec("ray") is None:
            raise Misconfigured("executor = ray needs the package ray: pip install 'continual[ray]'")
        self.address = address
        self._reached()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Answers] = {}
        self._users = 0
        self._said: deque[str] = deque(maxlen=20)
        self._failed = ""
        self._loaded, self._up, self._over = threading.Event(), threading.Event(), threading.Event()
        self._found: list[dict[str, Any]] = []
        self._answered = 0.0
        mine, others = socket.socketpair()
        with others:
            self._driver = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(others.fileno()), address],
                pass_fds=[others.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **os.environ},
                start_new_session=True,  # Ctrl-C is for this process, which has the orders end
            )
        self._link = Connection(mine.detach())
        self._to_send: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._hearing = threading.Thread(target=self._hear, name="cluster-hear", daemon=True)
        self._hearing.start()
        self._telling = threading.Thread(target=self._tell, name="cluster-tell", daemon=True)
        self._telling.start()
        threading.Thread(target=self._listen, name="cluster-listen", daemon=True).start()
        try:
            self._connect(go_on)
        except BaseException:
            self.close()
            raise

    @property
    def is_up(self) -> bool:
        """Whether the driver lives."""
        return not self._over.is_set()

    @property
    def nodes(self) -> Sequence[Mapping[str, Any]]:
        """The machines that are alive, as Ray last told of them."""
        return [node for node in self._found if node["Alive"]]

    @property
    def silent(self) -> float:
        """Seconds since the cluster last said which machines it has."""
        return time.monotonic() - self._answered

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While it lasts, somebody has work for this driver. Where the settings name another cluster by its end, and
        nobody else has, the driver ends."""
        with _LINKING:
            self._users += 1
        try:
            yield
        finally:
            with _LINKING:
                self._users -= 1
                self.end_unused()

    def end_unused(self) -> None:
        """Ends the driver of a cluster that the settings name no more, unless somebody has work for it; `_LINKING` is
        held."""
        if self.address in _LEFT and not self._users:
            self.close()

    def job(self, job: str, pickled: bytes | None) -> None:
        """Sends a job, before its first order; without bytes: it is over."""
        self._to_send.put(SendJob(job, pickled))

    def order(self, order: SendOrder, to: Answers) -> int:
        """Sends an order out, under a number of its own, which is returned; `to` gets what comes of it."""
        number = next(self._numbers)
        with self._lock:
            self._waiting[number] = to
        self._to_send.put(order._replace(number=number))
        if self._over.is_set():  # it may have ended before it was known that somebody waits
            to.put(None)
        return number

    def drop(self, number: int) -> None:
        """Has an order end that nobody waits for any more: nothing more is heard of it."""
        with self._lock:
            self._waiting.pop(number, None)
        self._to_send.put(SendStop((number,)))

    def end(self, numbers: Sequence[int], answers: Answers) -> None:
        """Has orders end that nobody waits for any more, and waits until they have."""
        if not numbers:
            return
        self._to_send.put(SendStop(tuple(numbers)))
        waiting, until = set(numbers), time.monotonic() + ENDED
        while waiting and self.is_up:
            if self.silent > SILENT or time.monotonic() > until:  # it ends them once it sees that the driver is gone
                self.close()
                return
            try:
                came = answers.get(timeout=_LOOK)
            except queue.Empty:
                continue
            if isinstance(came, Came):
                waiting.discard(came.number)

    def gone(self) -> Retry:
        """The error of work for which the driver has ended."""
        return Retry(
            f"the Ray cluster at {self.address} went away in the middle of the work ({self._last()}): look at its head "
            "and at the node of this machine; nothing was settled"
        )

    def close(self) -> None:
        """Ends the driver, and with it all that the cluster does for it."""
        self._driver.kill()
        self._driver.wait()
        self._to_send.put(None)
        self._hearing.join(1.0)
        self._over.set()

    def _connect(self, go_on: GoOn) -> None:
        until = time.monotonic() + LOADED
        while not self._up.wait(_LOOK):
            go_on()
            if self._loaded.is_set() and until > (later := time.monotonic() + CONNECTED):
                until = later
            if any("InvalidAuthToken" in line for line in tuple(self._said)):
                raise Retry(f"ray.address = {self.address}: the Ray cluster there has another token: it wants {_TOKEN}")
            if self._over.is_set():
                said = self._failed or self._last()
                raise Retry(
                    f"ray.address = {self.address}: no Ray cluster is there that this machine belongs to ({said}); "
                    f"{_START}; one that has a token wants {_TOKEN}"
                )
            if time.monotonic() > until:
                raise Retry(
                    f"ray.address = {self.address}: no Ray cluster answers there ({self._last()}): is its head still "
                    "up? Ray takes localhost for the address of the network card: name the head by HOST:PORT as "
                    f"'ray start' told it; {_START}"
                )

    def _reached(self) -> None:
        """Raises Retry where nobody listens at the address, Misconfigured where the environment has none of a head."""
        address = self.address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS", "") or address
        if "://" in address:
            raise Misconfigured(
                f"RAY_ADDRESS = {address}, in the environment: that is for 'ray job submit', or a Ray Client, which "
                "cannot be the driver: set ray.address to HOST:PORT of the head"
            )
        must_be_head("RAY_ADDRESS, in the environment,", address)
        if address != "auto":
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
            except (OSError, UnicodeError) as error:  # what is no name of a host is told as the second
                raise Retry(f"ray.address = {address}: nobody listens there ({error}); {_START}") from error

    def _tell(self) -> None:
        """Tells the driver what to do, until it has ended. One that does not listen keeps nobody else waiting."""
        with contextlib.suppress(OSError):
            while (message := self._to_send.get()) is not None:
                self._link.send(message)

    def _listen(self) -> None:
        """Takes what the driver tells, until it has ended."""
        try:
            while True:
                self._take(self._link.recv())
        except (EOFError, OSError):
            pass
        except Exception as error:  # half of a message, or another version's: who waits must not wait for ever
            self._said.append(f"what its driver says cannot be read: {type(error).__name__}: {error}")
        FIGURES.parted(self.address)
        self.close()
        self._telling.join()
        self._link.close()
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
        for one in waiting:
            one.put(None)

    def _take(self, message: object) -> None:
        if isinstance(message, Came):
            with self._lock:
                waiting = self._waiting.pop(message.number, None)
            if waiting is not None:
                waiting.put(message)
        elif isinstance(message, Began):
            with self._lock:
                begun = self._waiting.get(message.number)
            if begun is not None:
                begun.put(message)
        elif isinstance(message, Nodes):
            self._found, self._answered = message.found, time.monotonic()
            FIGURES.answered(self.address, nodes_of(message.found))
            self._up.set()
        elif isinstance(message, RayLoaded):
            self._loaded.set()
        elif isinstance(message, NotConnected):
            self._failed = message.why

    def _last(self) -> str:
        """The last that Ray said of itself, without the time and the line of its source; else the last of any trace."""
        said = tuple(self._said)  # another thread adds to it
        lines = [found[1] for line in said if (found := _OF_RAY.match(line))] or said
        return lines[-1].partition(". ")[0].rstrip(".")[:200] if lines else "its driver ended"

    def _hear(self) -> None:
        """Keeps the last of what Ray writes."""
        assert self._driver.stderr is not None
        with self._driver.stderr as lines:
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text and not _FRAME.match(text):
                    self._said.append(text)
                    _log.debug("the driver of Ray: %s", text)


Answers = queue.SimpleQueue[Began | Came | None]
"""Where it comes in what is heard of orders; None: the driver has ended, and nothing more will come."""
_LINKS: dict[str, ClusterLink] = {}
_LEFT: set[str] = set()
"""Addresses that the settings named before."""
_LINKING = threading.Lock()


def link_to(address: str, go_on: GoOn) -> ClusterLink:
    """The driver of the cluster at `address` that this process has; a new one where it has none that lives. Raises as
    `ClusterLink`."""
    with _LINKING:
        found = _LINKS.get(address)
        if found is None or not found.is_up:
            found = _LINKS[address] = ClusterLink(address, go_on)
        return found


def only(address: str | None) -> None:
    """The settings name the cluster at this address from now on, or none: drivers of others end, each once nobody has
    work for it any more."""
    with _LINKING:
        _LEFT.update(_LINKS.keys() - {address})
        _LEFT.discard(address or "")
        for link in _LINKS.values():
            link.end_unused()
