"""The service's own HTTP server: it accepts connections, reads one request of each with time-outs and limits, and has
the application answer. What is answered is for the application.

A stranger can open connections and say nothing, say little, or never read; none of this may cost the daemon more than a
few descriptors. So each connection carries one request, has so many seconds for its head and for all of it, and when
there are too many, the one that has been silent for longest makes room.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import h11
import structlog
from starlette.types import ASGIApp, Scope

from continual.service.web.exchange import Exchange, Gone

HEAD = 10.0
"""Seconds for the head of a request."""
WHOLE = 30.0
"""Seconds for all of a request and its answer."""
MOST = 64
"""Connections at a time."""
_DRAIN = 2.0
"""Seconds that requests under way have when the daemon stops."""
_BACKLOG = 128
_LONGEST_WAIT = 5.0
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Dropped = Callable[[str], None]
"""Hears why a connection was not answered as it asked: a word of `metrics.DROPPED`."""
Broke = Callable[[Exception], None]
"""Hears of an exception that the application let through."""


def most_connections(descriptors: int) -> int:
    """How many connections may be open where the process may have so many descriptors: folding keeps three quarters."""
    return max(4, min(MOST, descriptors // 4))


class Ears(NamedTuple):
    """Who hears of what went wrong."""

    dropped: Dropped
    broke: Broke


class _Client:
    """One connection. `asked`: its head was read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.exchange = Exchange(sock)
        self.asked = False
        self.task: asyncio.Task[None] | None = None


class Server:
    """Serves an application on a bound socket."""

    def __init__(
        self, app: ASGIApp, sock: socket.socket, ears: Ears, *, head: float = HEAD, whole: float = WHOLE
    ) -> None:
        """`head` and `whole` are the seconds for a request's head, and for all of it with its answer."""
        self.app = app
        self.most = most_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._sock = sock
        self._ears = ears
        self._head = head
        self._whole = whole
        self._patience = head / 10
        self._clients: dict[_Client, None] = {}  # oldest first
        self._log = structlog.get_logger("continual")

    async def run(self, started: Callable[[], None], stop: asyncio.Event) -> None:
        """Serves until `stop` is set; calls `started` once it listens. Requests under way have a moment to end."""
        self._sock.setblocking(False)
        self._sock.listen(_BACKLOG)
        started()
        accepting = asyncio.create_task(self._accept())
        try:
            await stop.wait()
        finally:
            accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await accepting
            self._sock.close()
            under_way = [client.task for client in self._clients if client.task and client.asked]
            if under_way:
                await asyncio.wait(under_way, timeout=_DRAIN)
            left = [client.task for client in self._clients if client.task]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _accept(self) -> None:
        """Takes connections for ever. Where there is no descriptor for one more, it waits, longer each time."""
        loop = asyncio.get_running_loop()
        failed = 0
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
                failed = 0
                await asyncio.sleep(0)  # accepting one that is there already does not let the loop turn
            except OSError as error:
                failed += 1
                if error.errno in _SHORT:
                    self._ears.dropped("full")
                    self._log.warning("no connection accepted", error=f"{error.strerror}: raise ulimit -n")
                    self._evict()
                await asyncio.sleep(min(0.05 * 2.0 ** min(failed, 10), _LONGEST_WAIT))
                continue
            if len(self._clients) >= self.most and not self._evict():
                self._ears.dropped("full")
                self._refuse(sock)
                continue
            client = _Client(sock)
            self._clients[client] = None
            client.task = asyncio.create_task(self._serve(client))
            client.task.add_done_callback(partial(self._over, client))

    def _over(self, client: _Client, _task: asyncio.Task[None]) -> None:
        """A connection has ended; its task may never have begun."""
        self._clients.pop(client, None)
        client.sock.close()

    def _evict(self) -> bool:
        """Ends the oldest connection that has not asked for anything yet, or else the one that for longest has neither
        sent what it began nor read its answer; whether there was one."""
        client = next((one for one in self._clients if not one.asked), None) or self._silent()
        if client is None or client.task is None:
            return False
        del self._clients[client]
        client.task.cancel()
        self._ears.dropped("full")
        return True

    def _silent(self) -> _Client | None:
        """The client that has been waited for the longest; none where each goes on."""
        since = {one: one.exchange.waits_since for one in self._clients}
        waits = [(at, one) for one, at in since.items() if at is not None and time.monotonic() - at > self._patience]
        return min(waits, key=lambda row: row[0])[1] if waits else None

    def _refuse(self, sock: socket.socket) -> None:
        """Says that there are too many, without waiting for anything."""
        with contextlib.suppress(OSError), sock:
            sock.setblocking(False)
            sock.send(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")

    async def _serve(self, client: _Client) -> None:
        """One connection from its first byte to its end."""
        exchange = client.exchange
        try:
            async with asyncio.timeout(self._whole):
                async with asyncio.timeout(self._head):
                    scope = await exchange.head()
                if scope is not None:
                    client.asked = True
                    await self._answer(exchange, scope)
            await exchange.end()
        except Gone:
            pass
        except TimeoutError:
            self._ears.dropped("slow")
        except h11.RemoteProtocolError as error:
            self._ears.dropped("malformed")
            await exchange.malformed(error)

    async def _answer(self, exchange: Exchange, scope: Scope) -> None:
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Gone:
            raise
        except Exception as error:  # the application has answered 500 where it could
            self._ears.broke(error)
