"""The service over HTTP: pages, JSON, events, metrics and probes, which read and never change anything. What a source
wants to be told over HTTP are routes of its own, and so are commands, where the settings let anybody give them here."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from continual.errors import Misconfigured
from continual.service.metrics import CONTENT_TYPE, Metrics
from continual.service.web.commanding import Commanding
from continual.service.web.events import Events
from continual.service.web.hosts import may_ask
from continual.service.web.looking import PageLook
from continual.service.web.machines import AsciiJson, Machines, description
from continual.service.web.pages import shell
from continual.service.web.people import People
from continual.service.web.seen import View
from continual.service.web.server import Ears, Server
from continual.texts import plain

_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_TROUBLE = {
    404: "There is no such page.",
    405: "This address does not take such a request.",
    500: "This could not be told. The log says why; the daemon goes on.",
}


def create_app(
    view: View,
    metrics: Metrics,
    routes: Sequence[BaseRoute] = (),
    names: Collection[str] = (),
    commanding: Commanding | None = None,
) -> Starlette:
    """The application on what `view` tells; `routes` are those that sources add, `names` by which it may be asked for
    besides localhost and addresses; `commanding` takes commands, where the settings let anybody give them here."""
    look = PageLook(view)
    machines, people = Machines(look), People(look, commanding)

    async def series(_request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def probe(ask: Callable[[], tuple[bool, str]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(_request: Request) -> Response:  # on the event loop: whether that turns is what is asked
            good, why = ask()
            return PlainTextResponse(f"{why}\n", 200 if good else 503)

        return answer

    async def trouble(request: Request, error: Exception) -> Response:
        """What cannot be answered, as programs or people read it."""
        status, head = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
        if status == 500:  # it passes by the guards
            head = {name.decode(): value.decode() for name, value in _HEADERS}
        told = _TROUBLE.get(status, f"{HTTPStatus(status).phrase}.")
        if request.url.path.startswith("/api/"):
            return AsciiJson({"error": told}, status, head)
        return HTMLResponse(shell.trouble(status, told, people.around), status, head)

    ours = [
        *people.routes(),
        *machines.routes(),
        *(commanding.routes() if commanding else []),
        description([row.described for row in machines.table()] + (commanding.described() if commanding else [])),
        Route("/events", Events(people.stamp, view).answer),
        Route("/metrics", series),
        Route("/healthz", probe(view.healthy)),
        Route("/readyz", probe(view.ready)),
    ]
    guards = [Middleware(_Headers), Middleware(_Names, names=names, metrics=metrics)]
    return Starlette(
        routes=[*ours, *routes], middleware=guards, exception_handlers={HTTPException: trouble, Exception: trouble}
    )


class _Names:
    """Answers 421 to a request by a name that is not ours."""

    def __init__(self, app: ASGIApp, names: Collection[str], metrics: Metrics) -> None:
        self.app = app
        self.names = names
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            if not may_ask(host, self.names):
                self.metrics.dropped("host")
                told = f"{plain(host or '', 100)} is no name of this service; set allowed_hosts if it is\n"
                await PlainTextResponse(told, 421)(scope, receive, send)
                return
        await self.app(scope, receive, send)


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


async def serve(
    app: Starlette, sock: socket.socket, started: Callable[[str], None], stop: asyncio.Event, ears: Ears
) -> None:
    """Serves `app` on `sock` until `stop` is set; calls `started` with the URL once it listens."""

    def listening() -> None:
        host, port = sock.getsockname()[:2]
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    await Server(app, sock, ears).run(listening, stop)
