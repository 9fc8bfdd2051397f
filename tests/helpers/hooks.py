"""Servers that are told of a publication, on loopback, and what is published: helpers of the tests of hooks."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from continual.config import HookSettings
from continual.publish.hooks import Called, call, check
from continual.publish.published import Published

Answer = tuple[int, Any]
"""A status, and JSON or text."""
STATE = "0123456789abcdef0123"


@dataclass
class Served:
    """A server that answers what `reply(path, body)` gives: a status and JSON or text; None drops the connection.
    `asked` is what came, `heads` and `bodies` as they came; `state` is what it says where it is only looked at."""

    url: str
    reply: Callable[[str, Any], Answer | None] = lambda _path, _body: (200, "")
    headers: dict[str, str] = field(default_factory=dict)
    state: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving_hooks() -> Iterator[Served]:
    """A server that runs as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(it.state).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(raw)
            it.heads.append({name.lower(): value for name, value in self.headers.items()})
            it.bodies.append(raw)
            it.asked.append((self.path, body))
            answer = it.reply(self.path, body)
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status, said = answer
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | it.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the other side went away, as it is meant to

    server = Server(("127.0.0.1", 0), Handler)
    it = Served(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield it
    finally:
        it.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Waits:
    """Stands for the waits between tries: takes down how long they are, and says at which the daemon stops."""

    stops_at: int = 99
    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return len(self.seconds) >= self.stops_at


def tell(hook: HookSettings, published: Published, waits: Waits | None = None) -> Called:
    check([hook])
    told = call(hook, published, threading.Event(), waits or Waits())
    assert told.message.isprintable()
    assert len(told.message) <= 300
    assert told.kind == hook.kind
    json.dumps(told.body())
    return told


def published(tmp_path: Path) -> Published:
    return Published(
        STATE,
        7,
        tmp_path / "current-7",
        tmp_path / "lora-7",
        "org/merge",
        "c0ffee",
        "https://hub/org/merge",
        "record-7",
    )


class VLLM:
    """What vLLM's routes do, as serving.py of 0.32.0 has them: a name that is taken is said before the adapter is
    looked at; `said` is what they say then. `broken`: what the engine says of every adapter."""

    def __init__(self, said: str = "has already been loaded.") -> None:
        self.said = said
        self.loaded: dict[str, str] = {}
        self.broken = ""

    def __call__(self, path: str, body: Any) -> Answer:
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if self.loaded.pop(name, None) is None:
                return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found.", "code": 404}}
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if path != "/v1/load_lora_adapter":
            return 404, {"detail": "Not Found"}
        if name in self.loaded:
            said = f"The lora adapter '{name}' {self.said}"
            return 400, {"error": {"message": said, "type": "InvalidUserInput", "param": None, "code": 400}}
        if self.broken:
            return 500, {"error": {"message": self.broken, "type": "InternalServerError", "param": None, "code": 500}}
        self.loaded[name] = body["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully."
