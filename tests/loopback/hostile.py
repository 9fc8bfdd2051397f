"""What a server that is hostile, or broken beyond belief, says: faults for `Hub.faults`, each over a real socket."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from tests.loopback.faults import Fault, Mangle, Policy, Raw, Status
from tests.loopback.journal import Request
from tests.loopback.routing import Answer

SHA = "0123456789abcdef0123456789abcdef01234567"
WHEN = "2026-01-31T12:00:00.000Z"


def row(repo: str = "evil/one", **other: Any) -> dict[str, Any]:
    """A row of a listing, as the Hub writes it but for what `other` says."""
    return {"id": repo, "sha": SHA, "lastModified": WHEN, "tags": [], "gated": False, "private": False} | other


def said(content: Any, status: int = 200, **headers: str) -> Status:
    """This content as JSON; headers by their names with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Status(status, named, json.dumps(content).encode())


def bomb(status: int = 200, megabytes: int = 4600, coding: str = "gzip", **headers: str) -> Status:
    """Four megabytes or so that unpack to gigabytes, all from one piece that is packed once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if coding == "gzip" else 15)
    head = packer.compress(b"[") + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Status(status, {"Content-Encoding": coding, **named}, head + piece * megabytes)


def packed(content: Any) -> Status:
    """This content as JSON in gzip, as the Hub may send it."""
    return Status(200, {"Content-Encoding": "gzip"}, gzip.compress(json.dumps(content).encode()))


def trickled(head: bytes = b"HTTP/1.1 200 OK\r\nX-Slow: ", piece: bytes = b"a") -> Raw:
    """A head that never ends, a byte at a time."""
    return Raw(head, piece, 10.0)


def trickled_body(length: int = 1_000_000, more: bytes = b"") -> Raw:
    """A body that comes a byte at a time."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n[" % (length, more)
    return Raw(head, b" ", 10.0)


def flood() -> Raw:
    """A body without an end, as fast as it is taken."""
    return Raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[", b" " * (1 << 16))


def heads() -> Raw:
    """Provisional answers without an end."""
    return Raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


class Endless:
    """A policy: a listing whose every page has a model that no other page has, and names a next one."""

    def __init__(self, link: Callable[[int], str], rows: Callable[[int], list[Any]] | None = None) -> None:
        """`link`: the address of the page after the n-th."""
        self._link, self._numbers = link, count(1)
        self._rows = rows or (lambda number: [row(f"evil/m{number}")])

    def __call__(self, request: Request) -> Fault | None:
        if request.path != "/api/models":
            return None
        number = next(self._numbers)
        return said(self._rows(number), Link=f'<{self._link(number)}>; rel="next"')


def changed(change: Callable[[Any], Any]) -> Mangle:
    """The real answer, with its JSON changed in place or replaced by what `change` returns."""

    def of(made: Answer) -> Answer:
        content = json.loads(bytes(made.body))
        result = change(content)
        return replace(made, body=json.dumps(content if result is None else result).encode())

    return Mangle(of)


def flipped(where: float = 0.5) -> Mangle:
    """One bit of the body is another one."""

    def of(made: Answer) -> Answer:
        body = bytearray(made.body)
        if made.status in (200, 206) and body:
            body[int(where * (len(body) - 1))] ^= 1
        return replace(made, body=bytes(body))

    return Mangle(of)


def headed(headers: Mapping[str, str], status: int | None = None) -> Mangle:
    """The real answer under other headers."""

    def of(made: Answer) -> Answer:
        return replace(made, status=status or made.status, headers={**made.headers, **headers})

    return Mangle(of)


def at(path: str, fault: Fault) -> Policy:
    """A policy: this fault wherever the path has this in it, always."""
    return lambda request: fault if path in request.path else None
