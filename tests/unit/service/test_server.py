"""The HTTP server on real sockets: what it answers, and what clients that are silent, slow, many or wrong get."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from continual.service.web.server import Ears, Server, most_connections
from tests.helpers import services

SLOW = 0.4
LARGE = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n"


class Running:
    """A server on a thread. `dropped` are the words it said, `broke` the exceptions."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self.dropped: list[str] = []
        self.broke: list[Exception] = []
        self.port = 0
        self.most = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        async def echo(request: Request) -> Response:
            return Response(await request.body(), headers={"x-path": request.url.path})

        async def fails(_request: Request) -> Response:
            raise OSError("the disk is gone")

        async def large(_request: Request) -> Response:
            return StreamingResponse(part() for _ in range(1))

        def part() -> bytes:
            return b"x" * (16 << 20)

        async def ok(_request: Request) -> Response:
            return PlainTextResponse("ok")

        routes = [
            Route("/ok", ok),
            Route("/fails", fails),
            Route("/large", large),
            Route("/e/{x}", echo, methods=["POST"]),
        ]
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        ears = Ears(self.dropped.append, self.broke.append)
        server = Server(Starlette(routes=routes), sock, ears, head=SLOW, whole=3 * SLOW)
        server.most = self._most or server.most
        self.most = server.most
        await server.run(self._ready.set, self._stop)

    def __enter__(self) -> Running:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def ask(self, method: str = "GET", path: str = "/ok", body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def opened(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def says(self, data: bytes) -> bytes:
        """All that is answered to `data`, to the end of the connection."""
        with self.opened() as sock:
            sock.sendall(data)
            found = b""
            while part := sock.recv(65536):
                found += part
            return found


@pytest.fixture
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


def test_it_answers_one_request_a_connection(server: Running) -> None:
    assert server.ask() == (200, b"ok")
    assert server.ask("HEAD") == (200, b"")
    assert server.ask("POST", "/e/a", b"y" * 300_000) == (200, b"y" * 300_000)
    assert server.ask("GET", "/nowhere")[0] == 404
    twice = server.says(b"GET /ok HTTP/1.1\r\nhost: x\r\n\r\nGET /ok HTTP/1.1\r\nhost: x\r\n\r\n")
    assert twice.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in twice.lower()
    assert b"200 OK" in server.says(b"GET /ok?a=b%20c HTTP/1.0\r\n\r\n")
    chunked = b"POST /e/%C3%BC HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n"
    told = server.says(chunked + b"3\r\nabc\r\n0\r\n\r\n")
    assert told.endswith(b"abc")
    assert server.dropped == []


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET http://elsewhere/ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /ok HTTP/1.1\r\n\r\n",
        b"GET /ok HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /ok HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 5000,
        b"\r\n\r\n\r\n",
    ],
)
def test_what_is_no_request_is_answered_as_such(server: Running, data: bytes) -> None:
    found = server.says(data)
    assert found.startswith(b"HTTP/1.1 4") or found == b""
    assert server.ask() == (200, b"ok")
    assert set(server.dropped) <= {"malformed", "slow"}
    assert server.dropped


@pytest.mark.slow
def test_a_client_that_is_silent_or_slow_with_its_head_or_body_is_cut_off(server: Running) -> None:
    begun = time.monotonic()
    assert server.says(b"") == b""
    assert server.says(b"GET /ok HT") == b""
    server.says(b"POST /e/a HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
    assert server.dropped == ["slow", "slow", "slow"]
    assert time.monotonic() - begun > 5 * SLOW


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off(server: Running) -> None:
    with server.opened() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(LARGE)
        deadline = time.monotonic() + 10
        while not server.dropped and time.monotonic() < deadline:
            assert server.ask() == (200, b"ok")
        assert server.dropped == ["slow"]


def test_a_client_that_sends_without_end_does_not_hold_up_the_others(server: Running) -> None:
    with server.opened() as sock, contextlib.suppress(OSError):
        sock.sendall(b"GET /ok HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(400):
            sock.sendall(b"z" * 65536)
    assert server.ask() == (200, b"ok")


@pytest.mark.slow
def test_silent_connections_make_room_for_the_next(server: Running) -> None:
    silent = [server.opened() for _ in range(3 * server.most)]
    assert server.most >= 4
    begun = time.monotonic()
    assert server.ask() == (200, b"ok")
    assert time.monotonic() - begun < SLOW, "nobody's time had to run out"
    assert server.dropped.count("full") > server.most
    for sock in silent:
        sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [b"POST /e/a HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc", LARGE])
def test_who_begins_and_does_not_go_on_makes_room_too(asked: bytes) -> None:
    with Running(most=4) as server, contextlib.ExitStack() as held:
        for _ in range(server.most):
            sock = held.enter_context(server.opened())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(asked)
        services.until(lambda: server.ask() == (200, b"ok"), "one makes room")
        assert set(server.dropped) == {"full"}, "nobody's time had to run out"


def test_a_client_that_waits_for_leave_to_send_gets_it(server: Running) -> None:
    with server.opened() as sock:
        sock.sendall(b"POST /e/a HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(b"abc")
        assert sock.recv(1000).endswith(b"abc")


def test_an_exception_of_a_page_is_500_and_heard_of(server: Running) -> None:
    assert server.ask("GET", "/fails")[0] == 500
    services.until(lambda: server.broke, "it is heard of")
    assert [str(error) for error in server.broke] == ["the disk is gone"]


def test_without_descriptors_it_waits_and_comes_back(server: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = server.opened()  # this end has its descriptor; the server's has to come
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    held: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        client = held and os.close(held.pop())
        assert client is None
        with server.opened():
            time.sleep(0.5)
            assert 1 <= server.dropped.count("full") <= 10, "it waits longer each time"
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
        held.clear()
        assert server.ask() == (200, b"ok")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
        waiting.close()


def test_folding_keeps_three_quarters_of_the_descriptors() -> None:
    assert [most_connections(limit) for limit in (8, 96, 256, 1024, 1 << 20)] == [4, 24, 64, 64, 64]
