"""`/events`: a stream of server-sent events (WHATWG HTML, section 9.2), by which an open page learns that there is
something new. A stream ends by itself after a while, and the browser opens the next: so it keeps the limits that every
request has, and nobody holds a connection for good."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from continual.service.web.seen import View
from continual.service.web.server import most_connections
from continual.service.web.view import UnderWay
from continual.texts import plain

LIFE = 20.0
"""Seconds of a stream; all of a request and its answer have thirty."""
MOST = 16
"""Streams at a time, and never more than a quarter of the connections that there may be."""
_EVERY = 0.5
"""Seconds between two looks."""
_AGAIN = 1000
"""Milliseconds after which the browser opens the next stream."""


class Events:
    """Tells open pages what is new in `view`, as `stamp` says; nobody is asked more often than every `every` seconds,
    whatever the number of pages."""

    def __init__(self, stamp: Callable[[], str], view: View, *, life: float = LIFE, every: float = _EVERY) -> None:
        self._stamp = stamp
        self._view = view
        self._most = max(1, min(MOST, most_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // 4))
        self._life = life
        self._every = every
        self._open = 0
        self._looked = 0.0
        self._found: tuple[str, UnderWay | None] = ("", None)

    async def answer(self, request: Request) -> Response:
        """A stream; 503 where there are too many."""
        if self._open >= self._most:
            return PlainTextResponse(f"{self._most} pages are open already\n", 503, {"retry-after": "15"})
        known = request.headers.get("last-event-id") or request.query_params.get("stamp", "")
        headers = {"x-accel-buffering": "no"}  # nginx would keep the events back
        return StreamingResponse(self._stream(known), media_type="text/event-stream", headers=headers)

    async def _stream(self, known: str) -> AsyncIterator[bytes]:
        self._open += 1
        try:
            end = time.monotonic() + self._life
            told: UnderWay | None = None
            yield f"retry: {_AGAIN}\n\n".encode()
            while time.monotonic() < end and not self._view.is_ending():
                stamp, current = self._look()
                if current != told:
                    told = current
                    yield _event("progress", _progress(current))
                if stamp != known:
                    known = stamp
                    yield _event("change", stamp, stamp)
                await asyncio.sleep(self._every)
        finally:
            self._open -= 1

    def _look(self) -> tuple[str, UnderWay | None]:
        now = time.monotonic()
        if now - self._looked >= self._every / 2:
            self._looked, self._found = now, (self._stamp(), self._view.under_way())
        return self._found


def _event(kind: str, data: str, number: str = "") -> bytes:
    """An event; `data` has no line end."""
    first = f"id: {number}\n" if number else ""
    return f"{first}event: {kind}\ndata: {data}\n\n".encode("ascii")


def _progress(current: UnderWay | None) -> str:
    if current is None:
        return "null"
    told = {"model": plain(current.model, 200), "stage": plain(current.stage), "done": current.done}
    return json.dumps({**told, "total": current.total})
