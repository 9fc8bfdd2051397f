"""A daemon in this process, beside a visitor on a thread; what the visitor waits for ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Sequence

import structlog

from continual.api import Merge
from continual.service import logs
from continual.service.daemon import Daemon
from continual.service.watched import sources_of
from continual.service.web import listen
from continual.sources.contract import Source
from tests.helpers import services


def made(merge: Merge, sources: Sequence[Source] | None = None) -> Daemon:
    """A daemon on `merge`, which is to run by `until`."""
    found = sources_of(merge) if sources is None else sources
    return Daemon(merge, listen("127.0.0.1", 0, allow_remote=False), found)


def until(daemon: Daemon, visit: Callable[[str], None]) -> None:
    """Runs the daemon while `visit` looks at it over HTTP, given its address; what `visit` raises is raised here."""
    raised: list[BaseException] = []

    def visitor() -> None:
        try:
            visit(str(services.until(lambda: daemon.live.url, "it listens")))
        except BaseException as error:
            raised.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=visitor)
    logs.configure(json=True)
    try:
        thread.start()
        asyncio.run(daemon.run())
        thread.join()
    finally:
        structlog.reset_defaults()
    if raised:
        raise raised[0]
