"""What stands between an object store and who asks it: a proxy that loses answers, is late, and says or asks things
twice."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

Fault = Literal["", "cut", "half", "late", "twice", "again", "lost", "failed", "busy", "unconditional", "denied"]
"""What becomes of a request. `cut`: it is done, and nothing of the answer comes; `half`: half of it; `late`: it comes
after a while; `twice`: it comes twice, and then the end; `again`: the request is done twice, and the second answer
comes; `lost`: nothing is done; `failed`: it is done, and the answer says 500; `busy`: nothing is done, and it says 503;
`unconditional`: it is done without its condition; `denied`: nothing is done, and the answer says that it may not
be."""

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_ANSWERS = {
    "denied": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    "failed": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "busy": b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN),
}


@dataclass
class Cutting:
    """A running proxy: `decide` is asked for every request, by its method and path."""

    address: str
    decide: Callable[[str, str], Fault] = lambda _method, _path: ""
    late: float = 0.3
    told: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def cutting(upstream: str) -> Iterator[Cutting]:
    """A proxy to the server at this address, on loopback."""
    there = urlsplit(upstream)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    proxy = Cutting(f"http://127.0.0.1:{listening.getsockname()[1]}")
    open_: set[socket.socket] = set()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                open_.add(client)
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), client, client.makefile("rb") as asked:
            server = socket.create_connection((str(there.hostname), int(there.port or 80)))
            with server, server.makefile("rb") as answers:
                while (request := _message(asked)) is not None:
                    if not _passed(proxy, request, client, server, answers):
                        return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for client in open_:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        thread.join()


def _passed(proxy: Cutting, request: bytes, client: socket.socket, server: socket.socket, answers: BinaryIO) -> bool:
    """Passes a request on, and what comes of it; whether the connection goes on."""
    method, path, _ = request.split(b"\r\n", 1)[0].decode().split(" ", 2)
    fault = proxy.decide(method, path)
    proxy.told[fault or "passed"] += 1
    if fault == "lost":
        return False
    if fault in ("denied", "busy"):
        client.sendall(_ANSWERS[fault])
        return True
    if fault == "unconditional":
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"if-none-match")]
        request = b"\r\n".join(lines) + b"\r\n\r\n" + body
    if fault == "again":  # a server may close a connection after an answer, and take its time
        with socket.create_connection(server.getpeername()) as other, other.makefile("rb") as first:
            other.sendall(request)
            _message(first, bodyless=method == "HEAD")
    server.sendall(request)
    answer = _message(answers, bodyless=method == "HEAD")
    if answer is None or fault == "cut":
        return False
    if fault == "half":
        client.sendall(answer[: len(answer) // 2])
        return False
    if fault == "failed":  # the server may be about to close its connection, as its own answer says
        client.sendall(_ANSWERS[fault])
        return False
    if fault == "late":
        time.sleep(proxy.late)
    client.sendall(answer)
    if fault == "twice":
        client.sendall(answer)
        return False  # else it would be the answer to what is asked next, which no client can tell
    return True


def _message(stream: BinaryIO, bodyless: bool = False) -> bytes | None:
    """The next request or answer, as it came; None at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return None
        head += line
    fields = {k.strip().lower(): v.strip() for k, _, v in (one.partition(b":") for one in head.split(b"\r\n")[1:])}
    if head.startswith(b"HTTP/1.1 100"):
        return _message(stream, bodyless)
    if bodyless or head[9:12] in (b"204", b"304"):
        return head
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = b""
        while True:
            line = stream.readline()
            size = int(line.partition(b";")[0], 16)
            body += line + stream.read(size + 2)
            if not size:
                return head + body
    return head + stream.read(int(fields.get(b"content-length", b"0")))
