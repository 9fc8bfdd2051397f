"""The process that is the driver of a Ray cluster, a child of the one that has work for it. Ray ends its drivers where
they stand when the head is gone, or lets them wait for minutes: so it happens to this process, which holds nothing.

It is told what to do by messages, and tells what came of it; `links` is the other end. Jobs and answers are bytes here.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

NODES = 5.0
"""Seconds after which the cluster is asked again which machines it has."""


class SendOrder(NamedTuple):
    """To the driver: an order of the job `job`, with the options of Ray that it runs under."""

    number: int
    job: str
    names: tuple[str, ...]
    versions: Mapping[str, str]
    options: Mapping[str, Any]


class SendJob(NamedTuple):
    """To the driver: a job, pickled, before its first order; without bytes: it is over."""

    job: str
    pickled: bytes | None


class SendStop(NamedTuple):
    """To the driver: nobody waits for these orders any more."""

    numbers: tuple[int, ...]


class Came(NamedTuple):
    """From the driver: the answer to an order, or why there is none; `lost`: its worker died."""

    number: int
    answer: bytes | None
    why: str = ""
    lost: bool = False


class Nodes(NamedTuple):
    """From the driver: the machines of the cluster, as Ray tells of them."""

    found: list[dict[str, Any]]


class RayLoaded(NamedTuple):
    """From the driver: Ray is loaded, and it begins to connect."""


class NotConnected(NamedTuple):
    """From the driver, its last word: it cannot connect."""

    why: str


def main(fd: int, address: str) -> None:
    """Drives the cluster at `address` until the other end of the socket `fd` is closed."""
    os.set_inheritable(fd, False)  # who has this end keeps the other one from seeing that this process has ended
    link, inbox = Connection(fd), queue.SimpleQueue[object]()
    threading.Thread(target=_receive, args=(link, inbox), daemon=True).start()
    import ray

    lock = threading.Lock()

    def tell(message: object) -> None:
        with lock:
            link.send(message)

    tell(RayLoaded())
    _ignore_signals()
    try:
        ray.init(address, namespace="continual", log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        tell(NotConnected(_line(error)))
        return
    _ignore_signals()  # Ray has set handlers of its own
    threading.Thread(target=_look, args=(ray, tell), daemon=True).start()
    _drive(ray, inbox, tell)


def _ignore_signals() -> None:
    """What is sent to all processes of a service is for the one that drains."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)


def _receive(link: Connection, inbox: queue.SimpleQueue[object]) -> None:
    """Takes what comes, whatever Ray is busy with. Ends the process when nobody is there any more: the cluster then
    ends what it does for it."""
    try:
        while True:
            inbox.put(link.recv())
    except (EOFError, OSError):
        os._exit(0)


def _look(ray: Any, tell: Any) -> None:
    while True:
        try:
            nodes = ray.nodes()
        except Exception as error:  # orders that are out say whether it matters
            sys.stderr.write(f"the cluster does not say which machines it has: {_line(error)}\n")
        else:
            tell(Nodes([{key: node[key] for key in ("NodeManagerAddress", "Alive", "Resources")} for node in nodes]))
        time.sleep(NODES)


def _drive(ray: Any, inbox: queue.SimpleQueue[object], tell: Any) -> None:
    from continual.executors.away import answered

    remote = ray.remote(answered)
    jobs: dict[str, Any] = {}
    running: dict[int, Any] = {}

    def came(number: int, future: Future[bytes]) -> None:
        running.pop(number, None)
        error = future.exception()
        if error is None:
            tell(Came(number, future.result()))
        else:
            tell(Came(number, None, _line(error), not isinstance(error, ray.exceptions.RayTaskError)))

    while True:
        message = inbox.get()
        if isinstance(message, SendJob):
            if message.pickled is None:
                jobs.pop(message.job, None)
            else:
                jobs[message.job] = ray.put(message.pickled)
        elif isinstance(message, SendStop):
            for ref in [running[number] for number in message.numbers if number in running]:
                ray.cancel(ref, force=True)
        elif isinstance(message, SendOrder):
            try:
                ref = remote.options(**message.options).remote(jobs[message.job], message.names, message.versions)
            except Exception as error:  # Ray takes no order with these options
                tell(Came(message.number, None, _line(error)))
                continue
            running[message.number] = ref
            ref.future().add_done_callback(lambda future, number=message.number: came(number, future))


def _line(error: BaseException) -> str:
    """An error of Ray in one line; of one that a worker raised, what was raised."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, Exception) else error
    lines = [line.strip() for line in str(shown).splitlines() if line.strip()] or [""]
    return textwrap.shorten(f"{type(shown).__name__}: {lines[0]}", 220, placeholder=" …")
