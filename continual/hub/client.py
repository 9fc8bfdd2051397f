"""Asks the Hub what there is, and reads bytes of it. The one module that calls the package huggingface_hub for reading;
it turns the package's errors into ours.

Every request has a time-out, is counted, and is tried again as `continual.retrying` decides: the retries of the package
differ from call to call, so they are not relied on. A redirect to another origin is followed without our token. No
message holds a header or the query of a URL: both can bear secrets.
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

from continual.errors import Abandoned, ContinualError, Misconfigured, Refuse, Retry
from continual.hub.names import is_repo, is_sha
from continual.retrying import Fault, fault_of, next_try

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import BlobLfsInfo
    from huggingface_hub.utils import httpx

T = TypeVar("T")
TIMEOUT = 20.0
"""Seconds without a byte after which a request of ours has failed."""
_CLIENTS_TIMEOUT = 60.0
"""Seconds without a byte after which a request of the package has failed where a call takes no time-out of ours."""
_LISTED = ("sha", "lastModified", "tags", "gated", "private")
_REDIRECTS = (301, 302, 303, 307, 308)
_LINKS = 1000
"""Signed links that are kept at most."""
_SKIPPED = 16 << 20
"""Bytes that are read and dropped where a mirror knows no ranges."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Trouble(Retry):
    """The Hub could not answer, or would not; `fault` says why. Nothing is settled."""

    def __init__(self, message: str, fault: Fault, after: float = 0.0) -> None:
        super().__init__(message, after)
        self.fault = fault


class RemoteFile(NamedTuple):
    """A file of a repo: its size in bytes, git's blob id, and the SHA-256 of its contents if it is stored in LFS."""

    name: str
    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Info:
    """A model repo at one commit. `files` by path; empty in a listing, which does not have them."""

    id: str
    sha: str
    modified: datetime
    tags: tuple[str, ...] = ()
    gated: bool = False
    private: bool = False
    files: Mapping[str, RemoteFile] = field(default_factory=dict)

    @property
    def licence(self) -> str | None:
        """The licence that the card of the repo names."""
        return next((tag.removeprefix("license:") for tag in self.tags if tag.startswith("license:")), None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its safetensors files."""
        return sum(file.size for file in self.files.values() if file.name.endswith(".safetensors"))


def must_be_online() -> None:
    """Raises Misconfigured if the package huggingface_hub is told to stay offline."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise Misconfigured("HF_HUB_OFFLINE is set: nothing can be read from the Hub; unset it, or give a directory")


class Hub:
    """The Hub at an endpoint (default: HF_ENDPOINT's), asked with the client's token. Thread-safe. `stop` ends waiting.

    `requests` and `received` count requests and bytes of bodies since it was made, for reports.
    """

    def __init__(
        self, *, endpoint: str | None = None, token: str | None = None, stop: threading.Event | None = None
    ) -> None:
        """Raises Misconfigured if the package huggingface_hub is told to stay offline."""
        from huggingface_hub import HfApi

        must_be_online()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings have signed links in them
        self.api = HfApi(endpoint=endpoint, token=token, library_name="continual", library_version=version("continual"))
        self.endpoint: str = self.api.endpoint
        self.stop = stop or threading.Event()
        self.requests = 0
        self.received = 0
        self._links: dict[tuple[str, str, str], str] = {}
        self._lock = threading.Lock()

    def info(self, repo: str, revision: str | None = None) -> Info:
        """A repo at `revision` (default: the newest commit of its main branch), with its files. Raises Refuse (`gone`,
        `gated`) and Trouble."""
        what = f"{repo}{f'@{revision}' if revision else ''}"
        found = self.ask(
            what, lambda: self.api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        )
        info = _info(found, what)
        if any(file.size is None for file in found.siblings or ()):  # mirrors do not tell sizes here
            from huggingface_hub import RepoFile

            files = self.ask(what, lambda: list(self.api.list_repo_tree(repo, revision=info.sha, recursive=True)))
            info = replace(
                info, files={f.path: _file(f.path, f.size, f.blob_id, f.lfs) for f in files if isinstance(f, RepoFile)}
            )
        return info

    def listing(self, *, tag: str | None = None, author: str | None = None) -> Iterator[Info]:
        """Models with a tag, or of an author, newest commit first; a page is fetched when it is needed. Raises Trouble.

        The client's own `list_models` waits out a rate limit for minutes and cannot be stopped, so pages are asked for
        here.
        """
        what = f"models of {author}" if author else f"models with {tag}"
        params: dict[str, str | Sequence[str] | None] | None = {
            "sort": "lastModified",
            "expand": _LISTED,
            **({"author": author} if author else {"filter": tag}),
        }
        url: str | None = f"{self.endpoint}/api/models"
        while url is not None:
            rows, url = self.ask(what, partial(self._page, url, params))
            params = None  # the next page's link has them
            yield from rows

    def _page(self, url: str, params: Mapping[str, str | Sequence[str] | None] | None) -> tuple[list[Info], str | None]:
        """Rows of a listing, and the address of the next page."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        answer = get_session().get(url, params=params, headers=build_hf_headers(token=self.api.token), timeout=TIMEOUT)
        hf_raise_for_status(answer)
        try:
            # an empty repo has no commit
            rows = [_listed(row) for row in answer.json() if is_repo(row["id"]) and is_sha(row.get("sha"))]
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError("no list of models") from error
        following = answer.links.get("next", {}).get("url")
        if not following:
            return rows, None
        # a mirror passes on the links of the Hub itself; our token is sent to the endpoint alone
        there = urlsplit(urljoin(url, following))
        return rows, urlunsplit((*urlsplit(self.endpoint)[:2], there.path, there.query, ""))

    def _ours(self, url: str) -> bool:
        """Whether an address is the endpoint's, which may have our token."""
        return urlsplit(url)[:2] == urlsplit(self.endpoint)[:2]

    def history(self, repo: str, revision: str) -> list[str]:
        """The commits before `revision`, newest first. Raises Refuse (`gone`) if there is no such commit, Trouble."""
        what = f"history of {repo}@{revision[:12]}"
        return [c.commit_id for c in self.ask(what, lambda: self.api.list_repo_commits(repo, revision=revision))][1:]

    def small(self, repo: str, sha: str, file: RemoteFile) -> bytes:
        """Reads a whole file at a commit. Raises as `fetch`."""
        data = bytearray(file.size)
        self.fetch(repo, sha, file, 0, memoryview(data))
        return bytes(data)

    def fetch(self, repo: str, sha: str, file: RemoteFile, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a file at commit `sha` from `start` on; a dropped connection goes on where it
        was.

        Raises Refuse (`gone`, `gated`) where they cannot be had, Trouble where they cannot be had now.
        """
        what = f"{repo}@{sha[:12]}/{file.name}"
        done, attempt = 0, 0
        while done < len(into):
            before = done
            try:
                for part in self._range(repo, sha, file, start + done, len(into) - done):
                    if self.stop.is_set():
                        raise _abandoned(what)
                    into[done : done + len(part)] = part
                    done += len(part)
                raise _Short
            except Exception as error:
                if done == len(into):
                    return
                attempt = 1 if done > before else attempt + 1
                self._wait_or_raise(what, error, attempt)

    def ask(self, what: str, call: Callable[[], T], tries: int | None = None) -> T:
        """Calls `call`, which makes one request with the package, until it succeeds or no try is left. Returns its
        result. Raises Refuse (`gone`, `gated`) and Trouble, both naming `what`."""
        attempt = 0
        while True:
            attempt += 1
            self._count(1, 0)
            try:
                _timed(_CLIENTS_TIMEOUT)
                return call()
            except Exception as error:
                self._wait_or_raise(what, error, attempt if tries is None else 1 << 30)

    def _wait_or_raise(self, what: str, error: Exception, attempt: int) -> None:
        if isinstance(error, ContinualError):
            raise error
        found = _failure(error)
        delay = next_try(found.fault, attempt, random.random(), found.after)  # chance only spreads requests
        if delay is None:
            raise _said(what, found, urlsplit(self.endpoint).netloc.rpartition("@")[2]) from None
        if self.stop.wait(delay):
            raise _abandoned(what) from None

    def _range(self, repo: str, sha: str, file: RemoteFile, start: int, length: int) -> Iterator[bytes]:
        """Up to `length` bytes from `start` on, in pieces. The link that a first request is redirected to is kept for
        the next ones, until it expires."""
        key = (repo, sha, file.name)
        with self._lock:
            link = self._links.get(key)
        if link is not None:
            with self._get(link, start, length, ours=False) as answer:
                if answer.status_code not in (400, 401, 403, 404, 410):
                    yield from self._body(answer, file, start, length)
                    return
            with self._lock:
                self._links.pop(key, None)
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(repo, file.name, revision=sha, endpoint=self.endpoint)
        for _ in range(5):
            ours = self._ours(url)
            with self._get(url, start, length, ours=ours) as answer:
                if answer.status_code not in _REDIRECTS:
                    yield from self._body(answer, file, start, length)
                    return
                answer.read()  # so that its connection serves the next request
                url = urljoin(url, answer.headers.get("location", ""))
            if not self._ours(url):
                with self._lock:
                    if len(self._links) >= _LINKS:
                        self._links.clear()
                    self._links[key] = url
        raise Trouble(f"{repo}@{sha[:12]}/{file.name}: redirected without end; nothing was settled", Fault.SERVER)

    def _get(self, url: str, start: int, length: int, *, ours: bool) -> AbstractContextManager[httpx.Response]:
        from huggingface_hub.utils import build_hf_headers, get_session

        self._count(1, 0)
        headers = build_hf_headers(token=self.api.token) if ours else {}
        headers |= {"range": f"bytes={start}-{start + length - 1}", "accept-encoding": "identity"}
        return get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=TIMEOUT)

    def _body(self, answer: httpx.Response, file: RemoteFile, start: int, length: int) -> Iterator[bytes]:
        from huggingface_hub.utils import hf_raise_for_status

        if answer.status_code not in (200, 206):
            answer.read()
            hf_raise_for_status(answer)
        skip = 0
        if answer.status_code == 206:
            said = _RANGE.fullmatch(answer.headers.get("content-range", ""))
            if said is None or int(said[1]) != start or int(said[3]) != file.size:
                what = "another range than was asked for, or of a file of another size"
                raise Trouble(f"{file.name}: the Hub answers with {what}; nothing was settled", Fault.SERVER)
        else:  # ranges are not known there
            if start > _SKIPPED:
                raise Trouble(
                    f"{file.name}: {self.endpoint} serves no ranges of it: set hub.read = cache; nothing was settled",
                    Fault.REQUEST,
                )
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


def _abandoned(what: str) -> Abandoned:
    return Abandoned(f"{what}: given up because continual is stopping; it will be taken up at the next start")


class _Short(Exception):
    """A body ended before the range did."""


class _Failure(NamedTuple):
    fault: Fault
    status: int | None
    after: float


def _failure(error: Exception) -> _Failure:
    """What an exception of the package says. An exception of an unknown kind counts as a failed connection: the package
    has several ways to say that."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status, headers = error.response.status_code, error.response.headers
        return _Failure(fault_of(status, headers.get("x-error-code")), status, asked_to_wait(headers))
    return _Failure(Fault.REQUEST if isinstance(error, errors.HFValidationError) else Fault.TRANSPORT, None, 0.0)


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds that the header `Retry-After` or `RateLimit` asks us to wait; 0 if there is none."""
    from huggingface_hub.utils import parse_ratelimit_headers

    try:
        if "retry-after" in headers:
            return max(0.0, min(float(headers["retry-after"]), 3600.0))
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0
    except ValueError:
        return 0.0


def _said(what: str, found: _Failure, host: str) -> Retry | Refuse:
    """The error that a failure is to whoever asked; `host` is the endpoint's, without credentials."""
    status = f" (HTTP {found.status})" if found.status else ""
    if found.fault is Fault.GONE:
        return Refuse("gone", f"{what}: is not on the Hub, or not for this token{status}")
    if found.fault is Fault.GATED:
        return Refuse(
            "gated", f"{what}: is gated; ask its owner for access with the account of HF_TOKEN, then 'continual retry'"
        )
    told = {
        Fault.RATE: "the Hub's rate limit is used up",
        Fault.SERVER: "the Hub has trouble",
        Fault.TRANSPORT: f"the connection to the Hub ({host}) failed",
        Fault.TOKEN: "the Hub does not accept the token: check HF_TOKEN",
        Fault.DENIED: "the Hub, or a proxy before it, does not allow it: check what the token HF_TOKEN may do",
        Fault.CONFLICT: "somebody else was there first",
        Fault.REQUEST: "the Hub does not understand the request",
    }[found.fault]
    return Trouble(f"{what}: {told}{status}; nothing was settled", found.fault, found.after)


def _timed(seconds: float) -> None:
    """Sets the time-out of the session that all calls of the package share: by default it waits for ever."""
    from huggingface_hub.utils import get_session, httpx

    session = get_session()
    if session.timeout != httpx.Timeout(seconds):
        session.timeout = httpx.Timeout(seconds)


def _listed(row: Mapping[str, object]) -> Info:
    """Reads a row of a listing. Raises TypeError or ValueError for one that no Hub writes."""
    tags, modified = row.get("tags") or (), row.get("lastModified") or "1970-01-01T00:00:00Z"
    if not isinstance(tags, list | tuple) or not isinstance(modified, str):
        raise TypeError("tags is no list, or lastModified no text")
    return Info(
        id=str(row["id"]),
        sha=str(row["sha"]),
        modified=datetime.fromisoformat(modified),
        tags=tuple(tag for tag in tags if isinstance(tag, str)),
        gated=bool(row.get("gated")),
        private=bool(row.get("private")),
    )


def _file(name: str, size: int, oid: str | None, lfs: BlobLfsInfo | None) -> RemoteFile:
    return RemoteFile(name, size, oid or "", lfs.sha256 if lfs else None)


def _info(found: ModelInfo, what: str) -> Info:
    if found.sha is None or not is_repo(found.id) or not is_sha(found.sha):
        raise Refuse("gone", f"{what}: the Hub names no commit of it: it is empty")
    files = {f.rfilename: _file(f.rfilename, f.size or 0, f.blob_id, f.lfs) for f in found.siblings or ()}
    modified = found.last_modified or datetime.fromtimestamp(0, UTC)
    tags = tuple(tag for tag in found.tags or () if isinstance(tag, str))
    return Info(found.id, found.sha, modified, tags, bool(found.gated), bool(found.private), files)
