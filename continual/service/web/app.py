"""The service over HTTP: status page, JSON, metrics and probes, which read and never change anything. What a source
wants to be told over HTTP are routes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from continual.errors import Misconfigured
from continual.service.metrics import CONTENT_TYPE, Metrics
from continual.service.web import page
from continual.service.web.view import View
from continual.texts import Json

_MOST = 1000
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def create_app(view: View, metrics: Metrics, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application on what `view` tells; `routes` are those that sources add."""

    async def index(_request: Request) -> Response:
        return HTMLResponse(page.render(await asyncio.to_thread(view.status)))

    async def status(_request: Request) -> Response:
        return JSONResponse((await asyncio.to_thread(view.status)).body())

    async def log(request: Request) -> Response:
        try:
            limit = int(request.query_params.get("limit", 100))
            before = int(request.query_params["before"]) if "before" in request.query_params else None
        except ValueError:
            return JSONResponse({"error": "limit and before are whole numbers"}, 400)
        if not 1 <= limit <= _MOST or (before is not None and before < 0):
            return JSONResponse({"error": f"limit is from 1 to {_MOST}, before a record number"}, 400)
        return JSONResponse(view.log(limit, before))

    async def series(_request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def probe(ask: Callable[[], tuple[bool, str]]) -> Callable[[Request], Response]:
        def answer(_request: Request) -> Response:
            good, why = ask()
            return PlainTextResponse(f"{why}\n", 200 if good else 503)

        return answer

    ours = [
        Route("/", index),
        Route("/api/status", status),
        Route("/api/log", log),
        Route("/metrics", series),
        Route("/healthz", probe(view.healthy)),
        Route("/readyz", probe(view.ready)),
    ]
    return Starlette(routes=[*ours, *routes], middleware=[Middleware(_Headers)])


class _Headers:
    """Adds the security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the daemon takes the signals, and code after serving must run."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int, *, allow_remote: bool) -> socket.socket:
    """A bound socket. Raises Misconfigured for an address that other machines reach (unless allowed) or that is
    taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Misconfigured(f"host = {host}: {error.strerror}") from None
    if not allow_remote and not ipaddress.ip_address(found[4][0]).is_loopback:
        raise Misconfigured(
            f"host = {host} is reached by other machines, and the service asks nobody who they are; "
            "set allow_remote = true if that is wanted"
        )
    sock = socket.socket(found[0], found[1])
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found[4])
    except OSError as error:
        sock.close()
        raise Misconfigured(
            f"port = {port} on {host}: {error.strerror}; name another with --port, or 0 for a free one"
        ) from None
    return sock


async def serve(app: Starlette, sock: socket.socket, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serves `app` on `sock` until `stop` is set; calls `started` with the URL once it listens."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2, server_header=False
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        host, port = sock.getsockname()[:2]
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
    finally:
        server.should_exit = True
        await serving


def parse(text: str) -> dict[str, Json]:
    """The body of an answer of /api/status. Raises ValueError if it is none."""
    body: Json = json.loads(text)
    if not isinstance(body, dict) or "state_id" not in body:
        raise ValueError("no status")
    return body
