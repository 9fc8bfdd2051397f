"""Requests to the Hub, made again as `continual.retrying` decides, and ranges of files. What is asked for, and what the
answers mean, is for `continual.hub.client`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlsplit

from continual.errors import ContinualError
from continual.hub.answers import LARGEST_ANSWER, RemoteFile
from continual.hub.trouble import Differs, Failed, abandoned, failure, said, span_of
from continual.retrying import Fault, next_try

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from huggingface_hub.utils import httpx

    from continual.hub.wire import Guard

T = TypeVar("T")
_SLOWEST = 4000
"""Bytes a second below which a range has failed. Five ranges at a time share a line: 20 kB/s of it."""
_LINKS = 1000
"""Signed links that are kept at most."""
_SKIPPED = 16 << 20
"""Bytes that are read and dropped where a mirror knows no ranges."""
_STALE = (400, 401, 403, 404, 410)


class Line:
    """The way to the Hub at `endpoint`, with a `token` (None: the client's). Thread-safe.

    `stop` ends every wait and every request; `hurry` those that bring next to nothing: continual waits for them in
    order to stop. `requests` and `received` count requests and bytes of bodies since it was made, for reports.
    """

    def __init__(self, endpoint: str, token: str | None, stop: threading.Event, hurry: threading.Event) -> None:
        self.endpoint = endpoint
        self.stop = stop
        self.hurry = hurry
        self.requests = 0
        self.received = 0
        self._token = token
        self._links: dict[tuple[str, str, str], str] = {}
        self._lock = threading.Lock()

    def fetch(self, repo: str, sha: str, file: RemoteFile, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a file at commit `sha` from `start` on; a dropped connection goes on where it
        was.

        Raises Refuse (`gone`, `gated`, `changed`) where they cannot be had, Trouble where they cannot be had now.
        """
        from continual.hub import wire

        what = f"{repo}@{sha[:12]}/{file.name}"
        end = time.monotonic() + wire.ANSWER_SECONDS + len(into) / _SLOWEST
        done, attempt = 0, 0
        while done < len(into):
            before = done
            guard = self._guard(what, end - time.monotonic(), len(into) - done + _SKIPPED + LARGEST_ANSWER)
            try:
                with wire.guarded(guard):
                    for part in self._range(repo, sha, file, start + done, len(into) - done):
                        into[done : done + len(part)] = part
                        done += len(part)
                raise Failed(Fault.TRANSPORT)  # the body ended before the range did
            except Exception as error:
                if done == len(into):
                    return
                attempt = 1 if done > before else attempt + 1
                self._wait_or_raise(what, error, attempt, end)

    def _tried(
        self,
        what: str,
        call: Callable[[], T],
        guard: Callable[[], Guard],
        tries: int | None = None,
        until: float | None = None,
    ) -> T:
        from continual.hub import wire

        attempt = 0
        while True:
            attempt += 1
            self._count(1, 0)
            try:
                with wire.guarded(guard()):
                    return call()
            except Exception as error:
                self._wait_or_raise(what, error, attempt if tries is None else 1 << 30, until)

    def _guard(self, what: str, seconds: float, most: int) -> Guard:
        from continual.hub import wire

        return wire.Guard(what, self.stop, self.hurry, time.monotonic() + seconds, most)

    def _wait_or_raise(self, what: str, error: Exception, attempt: int, until: float | None = None) -> None:
        """Waits until a request that failed is to be made again. Raises what the failure is to whoever asked, where it
        is not, or where that would be after the time `until`."""
        if isinstance(error, ContinualError):
            raise error
        found = failure(error)
        delay = next_try(found.fault, attempt, random.random(), found.after)  # chance only spreads requests
        if delay is None or (until is not None and time.monotonic() + delay > until):
            raise said(what, found, urlsplit(self.endpoint).netloc.rpartition("@")[2]) from None
        end = time.monotonic() + delay
        while (left := end - time.monotonic()) > 0:
            if self.stop.wait(min(left, 0.25)) or self.hurry.is_set():
                raise abandoned(what) from None

    def _range(self, repo: str, sha: str, file: RemoteFile, start: int, length: int) -> Iterator[bytes]:
        """Up to `length` bytes from `start` on, in pieces. The link that a first request is redirected to is kept for
        the next ones, until it expires."""
        from continual.hub import wire

        key = (repo, sha, file.name)
        with self._lock:
            link = self._links.get(key)
        if link is not None:
            with self._get(link, start, length) as answer:
                if answer.status_code not in _STALE:
                    yield from self._body(answer, file, start, length)
                    return
                wire.drain(answer)
            with self._lock:
                self._links.pop(key, None)
        url = f"{self.endpoint}/{quote(repo, safe='/')}/resolve/{sha}/{quote(file.name, safe='/')}"
        for _ in range(wire.MOST_REDIRECTS):
            with self._get(url, start, length) as answer:
                if answer.status_code not in wire.REDIRECTS:
                    yield from self._body(answer, file, start, length)
                    return
                wire.drain(answer)
                url = wire.redirected(url, answer.headers.get("location", ""), self.endpoint)
            if not wire.is_at(url, self.endpoint):
                with self._lock:
                    if len(self._links) >= _LINKS:
                        self._links.clear()
                    self._links[key] = url
        raise Failed(Fault.SERVER, why="redirected without end")

    def _get(self, url: str, start: int, length: int) -> AbstractContextManager[httpx.Response]:
        from huggingface_hub.utils import build_hf_headers

        from continual.hub import wire

        self._count(1, 0)
        headers = build_hf_headers(token=self._token) if wire.is_at(url, self.endpoint) else {}
        headers |= {"range": f"bytes={start}-{start + length - 1}", "accept-encoding": "identity"}
        return wire.stream(url, headers)

    def _body(self, answer: httpx.Response, file: RemoteFile, start: int, length: int) -> Iterator[bytes]:
        from continual.hub import wire

        if answer.status_code not in (200, 206):
            raise wire.refused(answer)
        skip = 0
        if answer.status_code == 206:
            span = span_of(answer.headers.get("content-range", ""))
            if span is not None and span.size != file.size:
                raise Differs(Fault.SERVER, why=f"is of {span.size} bytes, and the Hub says {file.size}")
            if span is None or span.first != start or span.last < start:
                raise Failed(Fault.SERVER, why="the Hub answers with another range than was asked for")
        else:  # ranges are not known there
            if start > _SKIPPED:
                why = f"{self.endpoint} serves no ranges of it: set hub.read = cache"
                raise Failed(Fault.REQUEST, why=why)
            whole, kind = answer.headers.get("content-length"), answer.headers.get("content-type", "")
            if whole != str(file.size) if whole is not None else kind.startswith("text/html"):
                raise Failed(Fault.SERVER, why="the Hub answers with something else than the file")
            skip = start
        left = length
        for part in answer.iter_raw():
            self._count(0, len(part))
            if left == 0:  # only now: a body that is not read to its end costs its connection
                return
            kept = part[skip : skip + left]
            skip = max(0, skip - len(part))
            left -= len(kept)
            if kept:
                yield kept

    def _count(self, requests: int, received: int) -> None:
        with self._lock:
            self.requests += requests
            self.received += received
