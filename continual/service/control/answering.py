"""The daemon's end of the control socket. Its permissions are the guard: the socket is its owner's alone, and who
connects has to be that user or root. Nothing that is sent, or not sent, holds up or ends the daemon: requests, waits,
connections and what is kept for a slow reader have limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import structlog

from continual.errors import Abandoned, Misconfigured, Retry
from continual.service.control import parley
from continual.service.control.acting import Answer
from continual.service.control.parley import Hearing
from continual.service.control.requests import Request, parse

MOST = 32
"""Connections at a time."""
PATIENCE = 10.0
"""Seconds that a request may take to come, and an answer to be read."""
_BUFFERED = 1 << 20
"""Bytes that wait for a slow reader; of progress and notes beyond them nothing is kept."""
_EVERY = 0.1
"""Seconds between two lines of progress."""
_GIVEN_UP = "given up, since who asked for it has gone"
Perform = Callable[[Request, Hearing], Coroutine[None, None, Answer]]
"""Does what a request asks for when its turn comes."""


class Outgoing:
    """What goes to one client. Its `hearing` is called on the thread that does the work, and ends that work by
    Abandoned once the client has gone."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.gone = threading.Event()
        self.begun = False
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._told = 0.0

    @property
    def hearing(self) -> Hearing:
        """Who hears how far the work is."""
        return Hearing(self._progress, self._note)

    def must_be_wanted(self) -> None:
        """Raises Abandoned once the client has gone."""
        if self.gone.is_set():
            raise Abandoned(_GIVEN_UP)

    def send(self, body: Answer) -> None:
        """A line, unless the client reads too slowly."""
        if self._writer.transport.get_write_buffer_size() < _BUFFERED:
            self._writer.write(parley.line(body))

    async def last(self, body: Answer) -> None:
        """The last line, whatever waits before it; gives up on a client that does not read it."""
        self._writer.write(parley.line(body))
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._writer.drain(), PATIENCE)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.begun = True  # first: who sees that it has not begun says that nothing was done
        self.must_be_wanted()
        now = time.monotonic()
        if now - self._told >= _EVERY or done == total:
            self._told = now
            self._later({"progress": [stage, done, total]})

    def _note(self, text: str) -> None:
        self.must_be_wanted()
        self._later({"note": text})

    def _later(self, body: Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.send, body)


class Control:
    """Takes requests for the daemon on the state in `state`, which has its lock. `doing` says what it does now."""

    def __init__(self, state: Path, perform: Perform, doing: Callable[[], str | None]) -> None:
        self._state = state
        self._perform = perform
        self._doing = doing
        self._open: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("continual")

    async def serve(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set. Where the file system has no sockets a line says so, and nothing is served."""
        try:
            sock = bound(self._state)
        except (OSError, Misconfigured) as error:
            self._log.warning("no control socket", error=str(error), hint="commands that write need the daemon stopped")
            await stop.wait()
            return
        ours = (self._state / parley.NAME).lstat().st_ino
        server = await asyncio.start_unix_server(self._connected, sock=sock, limit=parley.LONGEST)
        try:
            await stop.wait()
        finally:
            server.close()
            if self._open:
                await asyncio.wait(self._open, timeout=2)
            for task in self._open:
                task.cancel()
            with contextlib.suppress(OSError):  # who lost a lease may have a successor on this machine by now
                if (self._state / parley.NAME).lstat().st_ino == ours:
                    (self._state / parley.NAME).unlink()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with contextlib.suppress(OSError):  # the client has gone
                await self._answer(reader, Outgoing(writer), writer.get_extra_info("socket"))
        except Exception:  # a bug of ours: the daemon goes on
            self._log.exception("control failed")
        finally:
            self._open.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, out: Outgoing, sock: socket.socket) -> None:
        """Reads a request, has it done, and answers."""
        try:
            _must_be_us(sock)
            if len(self._open) > MOST:
                raise Retry(f"{MOST} commands talk to the daemon already; nothing was done")
            request = await _request(reader)
        except (Misconfigured, Retry) as error:
            await out.last({"error": parley.error_body(error)})
            return
        out.send({"heard": self._doing()})
        work = asyncio.ensure_future(self._perform(request, out.hearing))
        left = asyncio.ensure_future(reader.read(1))  # a client sends nothing more: it has gone, or gives up
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                out.gone.set()  # work that begins after this ends at its first progress
                self._log.info("command given up", command=request.title)
                if not out.begun:
                    work.cancel()
            await asyncio.wait({work})
            await out.last(_came_of(work))
        finally:
            out.gone.set()
            left.cancel()


def _came_of(work: asyncio.Future[Answer]) -> Answer:
    """The last line of an answer."""
    if work.cancelled():
        return {"error": parley.error_body(Abandoned(f"{_GIVEN_UP}; nothing was done"))}
    error = work.exception()
    return {"answer": work.result()} if error is None else {"error": parley.error_body(error)}


async def _request(reader: asyncio.StreamReader) -> Request:
    """The request that a client sends. Raises Misconfigured for what is none, Retry where none comes in time."""
    try:
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
    except TimeoutError:
        raise Retry(f"no request came within {PATIENCE:.0f} s") from None
    except ValueError:
        raise Misconfigured(f"the request is longer than {parley.LONGEST} bytes") from None
    try:
        return parse(line)
    except ValueError as error:
        raise Misconfigured(f"this daemon does not understand the request: {error}"[:500]) from None


def _must_be_us(sock: socket.socket) -> None:
    """Raises Misconfigured where another user has connected, and it is not root."""
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user not in (0, os.geteuid()):
        raise Misconfigured(f"user {user} may not control a daemon of user {os.geteuid()}")


def bound(state: Path) -> socket.socket:
    """The socket of the state in `state`, for its owner alone, in the place of one that a killed daemon left. Only who
    has the lock may call it. Raises OSError where there can be none, Misconfigured where something else is there."""
    file = state / parley.NAME
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(file.lstat().st_mode):
            raise Misconfigured(f"{file} is in the way: it is no socket; move it away")
        file.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # Linux gives the file the mode of the socket
        with parley.address(state) as path:
            sock.bind(path)
        file.chmod(0o600)  # where it does not
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
