"""The ASGI application of one origin: writes the journal, asks for a fault, and sends an answer whole or spoiled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.loopback import discussions, files, listing, writing, xet
from tests.loopback.faults import Drop, Fault, Mangle, Raw, Slow, Stale, Stall, Status, Truncate
from tests.loopback.hub import Hub
from tests.loopback.journal import Origin, Request
from tests.loopback.routing import ROUTES, Answer, answer

PIECE = 1 << 16  # bytes of a body sent at once
TICK = 0.01  # seconds between the pieces of a slow body

assert ROUTES, (discussions, files, listing, writing, xet)  # importing them registers their routes


class Connection(H11Protocol):
    """A connection that the application can reach, to break it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "connection": self}
        self.lost = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost.set()


class Application:
    """Serves the Hub on one of its two origins."""

    def __init__(self, hub: Hub, origin: Origin) -> None:
        self._hub, self._origin = hub, origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hub = self._hub
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["raw_path"].decode()
        request = Request(
            len(hub.journal), self._origin, scope["method"], path, scope["query_string"].decode(), headers
        )
        hub.journal.add(request)
        body = await read(receive, request)
        if hub.on_request:
            hub.on_request(request)
        fault = request.fault = hub.faults(request) if hub.faults else None
        if isinstance(fault, Status):
            made = Answer(fault.status, {"Content-Type": "application/json", **fault.headers}, fault.body)
        else:
            made = answer(hub, request, body, fault.changes if isinstance(fault, Stale) else 0)
        with contextlib.suppress(asyncio.CancelledError):  # at the end of the test, with the connection
            await deliver(made, fault, request, send, scope["state"]["connection"])


async def read(receive: Receive, request: Request) -> bytes:
    body = bytearray()
    while True:
        message: Message = await receive()
        body += message.get("body", b"")
        request.received = len(body)
        if not message.get("more_body"):
            return bytes(body)


async def deliver(made: Answer, fault: Fault | None, request: Request, send: Send, connection: Connection) -> None:
    """Sends the answer in pieces, with its fault if it has one."""
    if isinstance(fault, Mangle):
        made = fault.change(made)
    if isinstance(fault, Raw):
        return await write(fault, request, connection)
    body = memoryview(made.body)
    if isinstance(fault, Truncate):
        body = body[: fault.length]
    if isinstance(fault, Drop) and fault.after == 0:
        return await hang_up(connection)
    if isinstance(fault, Stall) and fault.after == 0:
        await asyncio.sleep(fault.seconds)
    headers = {"Content-Length": str(len(body)), **made.headers}
    request.status = made.status
    raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": made.status, "headers": raw})
    if request.method == "HEAD":
        return await send({"type": "http.response.body"})
    size = max(1, int(fault.bytes_per_second * TICK)) if isinstance(fault, Slow) else PIECE
    stop = fault.after if isinstance(fault, Drop | Stall) else 0
    while request.sent < len(body) and not connection.transport.is_closing():
        if stop and request.sent == stop:
            if isinstance(fault, Drop):
                return await hang_up(connection)
            assert isinstance(fault, Stall)
            await asyncio.sleep(fault.seconds)
        end = request.sent + size
        piece = body[request.sent : min(end, stop) if request.sent < stop else end]
        request.sent += len(piece)  # before it goes, for a client that has it all may look at once
        await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
        if isinstance(fault, Slow):
            await asyncio.sleep(TICK)
    if not connection.transport.is_closing():
        await send({"type": "http.response.body"})


async def hang_up(connection: Connection) -> None:
    """Closes the connection once what was written is out, and waits until the server knows: it would else complete the
    answer."""
    connection.transport.close()
    await connection.lost.wait()


async def write(fault: Raw, request: Request, connection: Connection) -> None:
    """Writes to the socket, past the server."""
    size = 1 << 16 if fault.bytes_per_second is None else max(1, int(fault.bytes_per_second * TICK))
    pause = 0.0 if fault.bytes_per_second is None else size / fault.bytes_per_second
    left, transport = fault.data, connection.transport
    while left and not transport.is_closing():
        piece, left = left[:size], left[size:] or fault.endless
        transport.write(piece)
        request.sent += len(piece)
        await asyncio.sleep(pause)
        while transport.get_write_buffer_size() > 1 << 20 and not transport.is_closing():
            await asyncio.sleep(TICK)
    await hang_up(connection)
