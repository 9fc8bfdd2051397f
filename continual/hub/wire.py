"""One request to a server that may be slow, broken or hostile: it ends when continual stops, and takes no more time,
bytes or memory than it may.

All requests go through the session that the package huggingface_hub shares, which is guarded here: reads from a socket
come in short slices, between which the guard of this thread is asked whether to go on, and what comes packed is
unpacked under a limit. This module knows no repos. It imports the package, so it is imported when it is needed.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub.utils import build_hf_headers, get_session, httpx

from continual.hub.answers import LARGEST_ANSWER
from continual.hub.trouble import Failed, abandoned, wait_of
from continual.retrying import Fault, fault_of

T = TypeVar("T")
TIMEOUT = 20.0
"""Seconds without a byte after which a request has failed."""
ANSWER_SECONDS = 60.0
"""Seconds for a whole answer of the API: a page of a thousand models takes the Hub a few."""
SLICE = 0.25
"""Seconds between two looks at whether to go on."""
HURRIED = 64 << 10
"""Bytes a second that a read must bring for it to go on while continual waits for it in order to stop."""
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
_LARGEST_ERROR = 64 << 10
_marked = "continual_guarded"


@dataclass(slots=True)
class Guard:
    """What the requests of a thread may take: until when (`until`, by `time.monotonic`), and how many bytes (`left`).
    `stop` ends them at once; `hurry` ends those that bring next to nothing. `what` is in messages."""

    what: str
    stop: threading.Event
    hurry: threading.Event
    until: float
    left: int
    _mark: tuple[float, int] | None = field(default=None, init=False)

    def check(self) -> None:
        """Raises Abandoned if continual is stopping, Failed where the time is over."""
        now = time.monotonic()
        if self.stop.is_set():
            raise abandoned(self.what)
        if now > self.until:
            raise Failed(Fault.TRANSPORT, why="the server is too slow: the time for this request is over")
        if self.hurry.is_set():
            if self._mark is None:
                self._mark = (now, self.left)
            elif now - self._mark[0] > 1.0:
                if self._mark[1] - self.left < HURRIED:
                    raise abandoned(self.what)
                self._mark = (now, self.left)

    def got(self, nbytes: int) -> None:
        """Counts bytes that came. Raises Failed where they are too many."""
        self.left -= nbytes
        if self.left < 0:
            raise Failed(Fault.SERVER, why="the server sends more than can be meant")


_guard: contextvars.ContextVar[Guard | None] = contextvars.ContextVar("guard", default=None)


@contextmanager
def guarded(guard: Guard) -> Iterator[None]:
    """Guards every request that this thread makes in the block."""
    before = _guard.set(guard)
    try:
        yield
    finally:
        _guard.reset(before)


class Answer(NamedTuple):
    """An answer of the API: its bytes, the header `Link`, and the address that gave it."""

    body: bytes
    link: str
    url: str


def ask(url: str, token: str | bool | None, endpoint: str) -> Answer:
    """The answer to a GET of the API, unpacked. The token goes to the endpoint alone, wherever we are sent.

    Raises Failed for every answer but 200, and the errors of the guard of this thread.
    """
    for _ in range(MOST_REDIRECTS):
        headers = build_hf_headers(token=token if is_at(url, endpoint) else False)
        with stream(url, headers) as answer:
            if answer.status_code in REDIRECTS:
                url = redirected(url, answer.headers.get("location", ""), endpoint)
                continue
            if answer.status_code != 200:
                raise refused(answer)
            body = bytearray()
            for part in answer.iter_raw():
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise Failed(Fault.SERVER, why=f"the server's answer is larger than {LARGEST_ANSWER} bytes")
            return Answer(bytes(body), answer.headers.get("link", ""), url)
    raise Failed(Fault.SERVER, why="the server redirects without end")


@contextmanager
def stream(url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """The answer to a GET, whose body is not read yet. Redirects are not followed."""
    with session().stream("GET", url, headers=dict(headers), follow_redirects=False, timeout=TIMEOUT) as answer:
        yield answer


def is_at(url: str, endpoint: str) -> bool:
    """Whether an address is the endpoint's, which may have our token."""
    return urlsplit(url)[:2] == urlsplit(endpoint)[:2]


def redirected(url: str, location: str, endpoint: str) -> str:
    """Where an answer of `url` sends us. Raises Failed for what is no address, and for one without encryption where the
    endpoint has it."""
    try:
        found = urljoin(url, location)
        scheme, host = urlsplit(found)[:2]
    except ValueError:
        scheme, host, found = "", "", ""
    allowed = ("https",) if urlsplit(endpoint).scheme == "https" else ("http", "https")
    if not location or scheme not in allowed or not host or len(found) > 1 << 16:
        raise Failed(Fault.SERVER, why="the server redirects to no address that can be followed")
    return found


def refused(answer: httpx.Response) -> Failed:
    """The failure that a status other than 200 is. What its body says is not used."""
    status, headers = answer.status_code, answer.headers
    drain(answer)
    return Failed(fault_of(status, headers.get("x-error-code")), status, wait_of(headers))


def apart(call: Callable[[], T], discard: Callable[[T], object] = lambda _: None) -> T:
    """Runs `call` on a thread of its own, under the guard of this thread; leaves it there where the guard says that it
    is over: for what cannot be cut short. A result that comes later goes to `discard`."""
    guard = _guard.get()
    if guard is None:
        return call()
    context, lock, done = contextvars.copy_context(), threading.Lock(), threading.Event()
    found: list[T] = []
    failed: list[BaseException] = []
    left = False

    def run() -> None:
        try:
            result = context.run(call)
            with lock:
                found.append(result)
                late = left
            if late:
                discard(result)
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        while not done.wait(SLICE):
            guard.check()
    except BaseException:
        with lock:
            left = True
            late = bool(found)
        if late:
            discard(found[0])
        raise
    if failed:
        raise failed[0]
    return found[0]


def session() -> httpx.Client:
    """The session that all calls of the package share, guarded."""
    shared = get_session()
    if not getattr(shared, _marked, False):
        shared._transport = _Bounded(shared._transport)
        shared._mounts = {
            pattern: None if mount is None else _Bounded(mount) for pattern, mount in shared._mounts.items()
        }
        setattr(shared, _marked, True)
    return shared


def drain(answer: httpx.Response) -> None:
    """Reads the rest of a body that is not used, so that its connection serves the next request; at most 64 kB of
    it."""
    left = _LARGEST_ERROR
    with suppress(Failed):
        for part in answer.iter_raw():
            left -= len(part)
            if left < 0:
                return


class _Bounded(httpx.BaseTransport):
    """A transport that asks for gzip or nothing, and unpacks it under a limit.

    httpx itself unpacks whatever comes, to any length. What it is given from here is not packed any more.
    """

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self._inner = inner
        pool = getattr(inner, "_pool", None)  # a transport that is not httpx's own has none, and is not interrupted
        if pool is not None:
            library = sys.modules[type(pool).__module__.partition(".")[0]]
            pool._network_backend = _Sliced(pool._network_backend, library.ReadTimeout)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("accept-encoding") != "identity":
            request.headers["accept-encoding"] = "gzip"
        answer = self._inner.handle_request(request)
        headers = [(k, v) for k, v in answer.headers.multi_items() if not _is_trap(k, v)]
        coding = answer.headers.get("content-encoding", "identity").strip().lower()
        body: Any = answer.stream
        if coding != "identity" and request.headers.get("accept-encoding") != "gzip":
            coding = "unasked"
        if coding != "identity":
            headers = [(k, v) for k, v in headers if k.lower() not in ("content-encoding", "content-length")]
            body = _Unpacked(answer.stream, coding)
        return httpx.Response(answer.status_code, headers=headers, stream=body, extensions=answer.extensions)

    def close(self) -> None:
        self._inner.close()


def _is_trap(name: str, value: str) -> bool:
    """Whether the package would wait by this header for longer than we wait for anybody, or fail to read it."""
    return name.lower() in ("ratelimit", "retry-after") and wait_of({name.lower(): value}) == 0.0


class _Unpacked(httpx.SyncByteStream):
    """A body without its gzip. Raises Failed where it is packed otherwise, broken, or too large."""

    def __init__(self, inner: Any, coding: str) -> None:
        self._inner = inner
        self._coding = coding

    def __iter__(self) -> Iterator[bytes]:
        if self._coding not in ("gzip", "x-gzip"):
            raise Failed(Fault.SERVER, why="the server packs its answer in a way that was not asked for")
        left, unpack = LARGEST_ANSWER, zlib.decompressobj(wbits=31)
        for part in self._inner:
            while part:
                try:
                    data = unpack.decompress(part, 1 << 20)
                except zlib.error:
                    raise Failed(Fault.SERVER, why="the server's answer cannot be unpacked") from None
                left -= len(data)
                if left < 0:
                    raise Failed(
                        Fault.SERVER, why=f"the server's answer is larger than {LARGEST_ANSWER} bytes when unpacked"
                    )
                if data:
                    yield data
                part = b"" if unpack.eof else unpack.unconsumed_tail

    def close(self) -> None:
        self._inner.close()


class _Sliced:
    """A network backend of httpcore whose waits can be cut short."""

    def __init__(self, inner: Any, late: type[Exception]) -> None:
        self._inner, self._late = inner, late

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> _SlicedStream:
        def connect() -> Any:
            return self._inner.connect_tcp(host, port, timeout, local_address, socket_options)

        return _SlicedStream(apart(connect, lambda made: made.close()), self._late)

    def connect_unix_socket(self, path: str, *args: Any) -> Any:
        return self._inner.connect_unix_socket(path, *args)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _SlicedStream:
    """A connection of httpcore that is read in slices."""

    def __init__(self, inner: Any, late: type[Exception]) -> None:
        self._inner, self._late = inner, late

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        guard = _guard.get()
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            if guard is not None:
                guard.check()
            try:
                data: bytes = self._inner.read(max_bytes, SLICE if guard is not None else timeout)
            except self._late:
                if guard is None or (end is not None and time.monotonic() >= end):
                    raise
                continue
            if guard is not None:
                guard.got(len(data))
            return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
        def shake() -> Any:
            return self._inner.start_tls(ssl_context, server_hostname, timeout)

        return _SlicedStream(apart(shake, lambda made: made.close()), self._late)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
