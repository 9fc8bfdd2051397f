"""The process that is the driver of a Ray cluster, a child of the one that has work for it. Ray ends its drivers where
they stand when the head is gone, or lets them wait for minutes: so it happens to this process, which holds nothing.

It is told what to do by messages, and tells what came of it; `links` is the other end. Jobs and answers are bytes here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

NODES = 5.0
"""Seconds after which the cluster is asked again which machines it has."""
NODE = ("NodeID", "NodeManagerAddress", "Alive", "Resources")
"""What is told of each."""


_ON = re.compile(r"\(pid=\d+, ip=([^\s,)]+)")


class SendOrder(NamedTuple):
    """To the driver: an order of the job `job`, with the options of Ray that it runs under. Of Ray's nodes those of
    the ids `avoid` do not do it; where `only` is an id, no other does."""

    number: int
    job: str
    names: tuple[str, ...]
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    avoid: tuple[str, ...] = ()
    only: str = ""


class SendJob(NamedTuple):
    """To the driver: a job, pickled, before its first order; without bytes: it is over."""

    job: str
    pickled: bytes | None


class SendStop(NamedTuple):
    """To the driver: nobody waits for these orders any more."""

    numbers: tuple[int, ...]


class Began(NamedTuple):
    """From the driver: a worker has begun with an order, on the machine with this address, on Ray's `node` there."""

    number: int
    machine: str
    node: str


class Came(NamedTuple):
    """From the driver: the answer to an order, or why there is none; `lost`: its worker died; else `machine` says on
    which one it could not be done, where Ray says that."""

    number: int
    answer: bytes | None
    why: str = ""
    lost: bool = False
    machine: str = ""


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
    _ignore_signals()
    os.set_inheritable(fd, False)  # who has this end keeps the other one from seeing that this process has ended
    link, inbox = Connection(fd), queue.SimpleQueue[object]()
    threading.Thread(target=_receive, args=(link, inbox), daemon=True).start()
    import ray

    lock = threading.Lock()

    def tell(message: object) -> None:
        with lock:
            link.send(message)

    tell(RayLoaded())
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
        pass
    except Exception as error:  # whatever it is, nobody else would see that the other end is closed
        sys.stderr.write(f"what is to be done cannot be read: {_line(error)}\n")
        sys.stderr.flush()
    finally:
        os._exit(0)


def _look(ray: Any, tell: Any) -> None:
    while True:
        try:
            nodes = ray.nodes()
        except Exception as error:  # orders that are out say whether it matters
            sys.stderr.write(f"the cluster does not say which machines it has: {_line(error)}\n")
        else:
            tell(Nodes([{key: node[key] for key in NODE} for node in nodes]))
        time.sleep(NODES)


def _drive(ray: Any, inbox: queue.SimpleQueue[object], tell: Any) -> None:
    from continual.executors.away import answered

    remote, loop = ray.remote(answered), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    jobs: dict[str, Any] = {}
    running: dict[int, Any] = {}

    async def follow(number: int, said: Any) -> None:
        try:
            came = await _followed(ray, number, said, tell)
        except Exception as error:  # whatever it is: somebody waits
            came = Came(number, None, f"{type(error).__name__}: {error}", lost=True)
        running.pop(number, None)
        tell(came)

    while True:
        message = inbox.get()
        if isinstance(message, SendJob):
            if message.pickled is None:
                jobs.pop(message.job, None)
            else:
                jobs[message.job] = ray.put(message.pickled)
        elif isinstance(message, SendStop):
            for said in [running[number] for number in message.numbers if number in running]:
                ray.cancel(said, force=True)
        elif isinstance(message, SendOrder):
            try:
                options = _placed(message)
                said = remote.options(**options).remote(jobs[message.job], message.names, message.versions)
            except Exception as error:  # Ray takes no order with these options
                tell(Came(message.number, None, _line(error)))
                continue
            running[message.number] = said
            asyncio.run_coroutine_threadsafe(follow(message.number, said), loop)


async def _followed(ray: Any, number: int, said: Any, tell: Any) -> Came:
    """Tells that an order has begun; what came of it."""
    try:
        async for ref in said:
            found = await ref
            if isinstance(found, bytes):
                return Came(number, found)
            tell(Began(number, *found))
    except ray.exceptions.RayTaskError as error:
        return Came(number, None, _line(error), machine=_where(error))
    except Exception as error:
        return Came(number, None, _line(error), lost=True)
    return Came(number, None, "its worker gave no answer", lost=True)


def _where(error: Exception) -> str:
    """The address of the machine on which a worker could not begin an order, as the error of Ray says it in its words:
    where the function cannot be loaded, nowhere else; empty where it does not."""
    found = _ON.search(str(error))
    return found[1] if found else ""


def _placed(order: SendOrder) -> dict[str, Any]:
    """The options of an order with where it may be done. A worker says two things of it, one after the other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options = {**order.options, "num_returns": "streaming"}
    if order.only:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(order.only, soft=False)
    elif order.avoid:
        options["label_selector"] = {"ray.io/node-id": f"!in({','.join(order.avoid)})"}
    return options


def _line(error: BaseException) -> str:
    """An error of Ray in one line; of one that a worker raised, what was raised."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, Exception) else error
    lines = [line.strip() for line in str(shown).splitlines() if line.strip()] or [""]
    if "failed to import on the worker" in str(shown):  # why not stands at the end of a trace
        return textwrap.shorten(lines[-1], 220, placeholder=" …")
    return textwrap.shorten(f"{type(shown).__name__}: {lines[0]}", 220, placeholder=" …")
