"""A Hub on two loopback ports: the API's origin is 127.0.0.1 and the CDN's localhost, so that the client takes them for
two hosts."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import uvicorn

from tests.loopback.app import Application, Connection
from tests.loopback.hub import Hub


@contextmanager
def serving(hub: Hub | None = None, *, port: int = 0, cdn_port: int = 0) -> Iterator[Hub]:
    """The Hub, served by one thread while the block lasts; `hub.endpoint` is then the API's origin. Connections still
    open at the end are cut."""
    hub = hub or Hub()
    with ExitStack() as stack:
        sockets = [stack.enter_context(listener(number)) for number in (port, cdn_port)]
        hub.endpoint = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        hub.cdn = f"http://localhost:{sockets[1].getsockname()[1]}"
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        started, stop = threading.Event(), asyncio.Event()
        thread = threading.Thread(
            target=lambda: loop.run_until_complete(run(hub, sockets, started, stop)), name="hub", daemon=True
        )
        thread.start()
        try:
            started.wait()
            yield hub
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()


def listener(port: int) -> socket.socket:
    made = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio sets TCP_NODELAY by the protocol
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


async def run(hub: Hub, sockets: list[socket.socket], started: threading.Event, stop: asyncio.Event) -> None:
    """Serves until told to stop, then cuts what is open. uvicorn's own main loop and graceful shutdown take 0.2 s and
    more."""
    servers = [start(Application(hub, "api")), start(Application(hub, "cdn"))]
    for server, made in zip(servers, sockets, strict=True):
        await server.startup(sockets=[made])
    started.set()
    await stop.wait()
    for made in (
        sockets
    ):  # Python 3.11 forgets a socket that it accepted from a server closed since: accept no more, then close
        asyncio.get_running_loop().remove_reader(made)
    this = asyncio.current_task()
    while True:  # some may be in the midst of being accepted
        await asyncio.sleep(0.001)
        states = [server.server_state for server in servers]
        for connection in [c for state in states for c in state.connections]:
            connection.transport.abort()
        for task in [t for state in states for t in state.tasks]:
            task.cancel()
        if asyncio.all_tasks() == {this} and not any(state.connections for state in states):
            break
    for server in servers:
        for listening in server.servers:
            listening.close()
            await listening.wait_closed()


def start(app: Application) -> uvicorn.Server:
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=60
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    return server
