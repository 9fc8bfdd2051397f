"""What may go wrong with an answer, and policies that say when. How each is carried out is in `app`.

A `Status` replaces the answer: nothing was done. The others spoil the answer to a request that was carried out: a
commit whose answer is dropped has happened.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.loopback.journal import Request

if TYPE_CHECKING:
    from tests.loopback.routing import Answer


@dataclass(frozen=True)
class Status:
    """Answers with this status and does nothing else."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error":"a fault of the tests"}'


@dataclass(frozen=True)
class Drop:
    """Closes the connection after that many bytes of the body; at 0 not even the head is sent."""

    after: int = 0


@dataclass(frozen=True)
class Stall:
    """Says nothing for some seconds after that many bytes of the body; at 0 the head waits too."""

    seconds: float
    after: int = 0


@dataclass(frozen=True)
class Slow:
    """Sends the body at this rate."""

    bytes_per_second: float


@dataclass(frozen=True)
class Truncate:
    """Sends only so many bytes and declares just these: a wrong Content-Length, a short file, a clean end."""

    length: int


@dataclass(frozen=True)
class Stale:
    """Answers a list from the state of that many changes ago; a new repository and its first commit are two."""

    changes: int


@dataclass(frozen=True)
class Mangle:
    """Sends what `change` makes of the answer."""

    change: Callable[[Answer], Answer]


@dataclass(frozen=True)
class Raw:
    """Writes these bytes to the socket in place of an answer, head and all, and then `endless` again and again until
    the client goes away, or nothing more. `bytes_per_second`: None for as fast as they are taken."""

    data: bytes
    endless: bytes = b""
    bytes_per_second: float | None = None


Fault = Status | Drop | Stall | Slow | Truncate | Stale | Mangle | Raw
Policy = Callable[[Request], Fault | None]


def too_many(seconds: int = 1) -> Status:
    """429, as the Hub says it: the client's lists wait `seconds` + 1."""
    headers = {
        "Retry-After": str(seconds),
        "RateLimit": f'"api";r=0;t={seconds}',
        "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
    }
    return Status(429, headers, b'{"error":"You have reached the rate limit"}')


def unavailable() -> Status:
    return Status(503, {"Retry-After": "1"})


def broken() -> Status:
    return Status(500)


def expired() -> Status:
    """What a CDN says to a link whose time is over."""
    return Status(
        403,
        {"Content-Type": "application/xml"},
        b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
    )


class Times:
    """A policy: this fault for the first `times` requests that match, after `skip` of them. `path` is a regular
    expression."""

    def __init__(
        self, fault: Fault, times: int = 1, *, method: str = "", path: str = "", origin: str = "", skip: int = 0
    ) -> None:
        self._fault, self._method, self._path, self._origin = fault, method, re.compile(path), origin
        self._range = range(skip, skip + times)
        self._seen = 0

    def __call__(self, request: Request) -> Fault | None:
        if (
            self._method not in ("", request.method)
            or self._origin not in ("", request.origin)
            or not self._path.search(request.path)
        ):
            return None
        self._seen += 1
        return self._fault if self._seen - 1 in self._range else None


def either(*policies: Policy) -> Policy:
    """A policy: the first fault that any of these has; each of them sees every request."""

    def decide(request: Request) -> Fault | None:
        return next((fault for fault in [policy(request) for policy in policies] if fault), None)

    return decide


class Random:
    """A policy: a share `rate` of requests fails, in ways that fit them, but never one (method and path) over `cap`
    times in a row.

    What befalls the n-th request for a path depends on the seed, the path and n alone, whatever else goes on.
    """

    def __init__(self, seed: int, rate: float, *, kinds: Sequence[Fault] | None = None, cap: int = 2) -> None:
        self._seed, self._rate, self._cap = seed, rate, cap
        self._kinds = kinds
        self._seen: dict[tuple[str, str], int] = {}
        self._row: dict[tuple[str, str], int] = {}

    def __call__(self, request: Request) -> Fault | None:
        key = (request.method, request.path)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        dice = random.Random(f"{self._seed} {key} {seen}")
        fails = dice.random() < self._rate and self._row.get(key, 0) < self._cap
        self._row[key] = self._row.get(key, 0) + 1 if fails else 0
        return dice.choice(self._kinds or fitting(request, dice)) if fails else None


def fitting(request: Request, dice: random.Random) -> list[Fault]:
    """Faults that a request like this one may meet."""
    after = int(10 ** dice.uniform(0, 5))
    kinds: list[Fault] = [unavailable(), broken(), Drop(), Stall(0.05)]
    if request.origin == "api":
        kinds.append(too_many(0))
    if request.listing:
        kinds.append(Stale(dice.randint(1, 3)))
    if request.method == "GET":
        kinds += [Drop(after), Stall(0.05, after)]
    if request.origin == "cdn" and request.method == "GET":
        kinds += [expired(), Truncate(after), Slow(1e6)]
    return kinds
