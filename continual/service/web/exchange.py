"""One request and its answer on a connection: between the bytes of HTTP/1.1, which h11 reads and writes, and ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import unquote

import h11
from starlette.types import Message, Scope

LARGEST_HEAD = 16 << 10
"""Bytes of a head."""
_LINGER = 1.0
"""Seconds for which what a client still sends is read and dropped, so that it gets the answer."""
_LINGERED = 64
"""How often at most it is read then."""
_CHUNK = 16 << 10


class Gone(Exception):
    """The client is gone: its connection cannot be read or written any more."""


class Exchange:
    """One request and its answer on a connection, between HTTP/1.1 (h11) and ASGI."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST_HEAD)
        self._loop = asyncio.get_running_loop()
        self._bodiless = False
        self._started: h11.Response | None = None
        self.waits_since: float | None = None
        """Since when (`time.monotonic`) the client neither sends what is asked of it nor takes what it gets."""

    async def head(self) -> Scope | None:
        """The request's head as ASGI has it; None where the client closed the connection. Raises RemoteProtocolError,
        Gone."""
        event = await self._next()
        if not isinstance(event, h11.Request):
            return None
        self._bodiless = event.method == b"HEAD"
        path, _, query = event.target.partition(b"?")
        if not path.startswith(b"/"):
            raise h11.RemoteProtocolError("the target is no path")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": event.http_version.decode("ascii"),
            "method": event.method.decode("ascii"),
            "scheme": "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(event.headers),
            "client": _address(self._sock.getpeername),
            "server": _address(self._sock.getsockname),
        }

    async def receive(self) -> Message:
        """The next part of the body, then the end of the connection; a body that is cut off or no HTTP ends it, too."""
        try:
            event = await self._next()
        except (Gone, h11.RemoteProtocolError):
            return {"type": "http.disconnect"}
        if isinstance(event, h11.Data):
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        if isinstance(event, h11.EndOfMessage):
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Sends a part of the answer; the head goes with the first part of the body."""
        if message["type"] == "http.response.start":
            dated = (b"date", formatdate(time.time(), usegmt=True).encode())
            headers = [*message.get("headers", ()), dated, (b"connection", b"close")]
            self._started = _response(message["status"], headers)
            return
        events: list[h11.Event] = [self._started] if self._started else []
        self._started = None
        if not self._bodiless and message.get("body"):
            events.append(h11.Data(data=message["body"]))
        if not message.get("more_body", False):
            events.append(h11.EndOfMessage())
        await self._say(*events)

    async def end(self) -> None:
        """Ends the connection so that the client gets all of the answer: what it still sends is read for a moment."""
        with contextlib.suppress(TimeoutError, Gone, OSError):
            async with asyncio.timeout(_LINGER):
                self._sock.shutdown(socket.SHUT_WR)
                for _ in range(_LINGERED):
                    if not await self._hear():
                        return

    async def malformed(self, error: h11.RemoteProtocolError) -> None:
        """Answers what is no HTTP, where nothing was answered yet."""
        if self._http.our_state is not h11.SEND_RESPONSE and self._http.our_state is not h11.IDLE:
            return
        text = f"{error}\n".encode("ascii", "backslashreplace")
        status = error.error_status_hint
        with contextlib.suppress(Gone, TimeoutError, h11.LocalProtocolError):
            async with asyncio.timeout(_LINGER):
                length = (b"content-length", str(len(text)).encode())
                head = _response(status, [length, (b"connection", b"close")])
                await self._say(head, h11.Data(data=text), h11.EndOfMessage())
            await self.end()

    async def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What the client says next. Raises RemoteProtocolError, Gone."""
        while True:
            event = self._http.next_event()
            if event is h11.PAUSED:  # it has said all that this connection carries
                return event
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self._say(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self._hear())

    async def _hear(self) -> bytes:
        """What comes next; nothing at the end. Raises Gone."""
        await asyncio.sleep(0)  # reading what is there already does not let the loop turn
        with self._waiting():
            return await self._loop.sock_recv(self._sock, _CHUNK)

    async def _say(self, *events: h11.Event) -> None:
        """Sends these together. Raises Gone."""
        data = b"".join(self._http.send(event) or b"" for event in events)
        if data:
            with self._waiting():
                await self._loop.sock_sendall(self._sock, data)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """It is the client's turn. Raises Gone."""
        self.waits_since = time.monotonic()
        try:
            yield
        except OSError as error:
            raise Gone from error
        finally:
            self.waits_since = None


def _response(status: int, headers: list[tuple[bytes, bytes]]) -> h11.Response:
    reason = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else ""
    return h11.Response(status_code=status, headers=headers, reason=reason.encode("ascii"))


def _address(name: Callable[[], object]) -> tuple[str, int] | None:
    try:
        found = name()
    except OSError:  # the client is gone
        return None
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) and len(found) >= 2 else None
