"""Asks the Hub what there is, and reads bytes of it. With `continual.hub.wire` the only modules that call the package
huggingface_hub for reading; its errors become ours.

Every request has a limit of time and bytes, is counted, and is tried again as `continual.retrying` decides: the retries
of the package differ from call to call, so they are not relied on. A redirect to another origin is followed without our
token. No message holds a header or the query of a URL: both can bear secrets. What an answer says is for
`continual.hub.answers`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlencode

from continual.errors import Misconfigured, Refuse
from continual.hub.answers import (
    LARGEST_ANSWER,
    MOST_FILES,
    DoesNotFit,
    Info,
    Misfit,
    RemoteFile,
    commits_of,
    model_of,
    models_of,
    tags_of,
    tree_of,
)
from continual.hub.line import Line
from continual.hub.names import is_sha
from continual.hub.proof import is_known, same
from continual.hub.trouble import Failed, Trouble, next_of, said
from continual.retrying import Fault
from continual.tensors.checkpoints.files import LARGEST_CONFIG

if TYPE_CHECKING:
    from continual.hub.wire import Answer

T = TypeVar("T")
_CLIENTS_TIMEOUT = 60.0
"""Seconds without a byte after which a request of the package has failed where a call takes no time-out of ours."""
_CLIENTS_SECONDS = 120.0
"""Seconds for a whole call of the package, where it moves no files."""
_LISTED = ("sha", "lastModified", "tags", "gated", "private")
_TREE = 1000
"""Pages of the list of a repo's files that are read: the Hub has a thousand files on one."""
_HISTORY = 100
"""Pages of a repo's history that are read: 5000 commits."""


@dataclass(slots=True)
class Budget:
    """What one look at a listing may take: pages, and seconds `until` (by `time.monotonic`). `rest`: the address of the
    page at which it stopped because of that; None where the listing was read as far as it was wanted."""

    pages: int
    until: float
    rest: str | None = field(default=None, init=False)

    @property
    def spent(self) -> bool:
        """Whether there is nothing left."""
        return self.pages <= 0 or time.monotonic() >= self.until


def must_be_online() -> None:
    """Raises Misconfigured if the package huggingface_hub is told to stay offline."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise Misconfigured("HF_HUB_OFFLINE is set: nothing can be read from the Hub; unset it, or give a directory")


class Hub(Line):
    """The Hub at an endpoint (default: HF_ENDPOINT's), asked with the client's token. Thread-safe. `stop` and `hurry`
    as `Line` says. `api` is the package's own, for what is written."""

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        stop: threading.Event | None = None,
        hurry: threading.Event | None = None,
    ) -> None:
        """Raises Misconfigured if the package huggingface_hub is told to stay offline."""
        from huggingface_hub import HfApi

        must_be_online()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings have signed links in them
        self.api = HfApi(endpoint=endpoint, token=token, library_name="continual", library_version=version("continual"))
        super().__init__(self.api.endpoint.rstrip("/"), token, stop or threading.Event(), hurry or threading.Event())

    def info(self, repo: str, revision: str | None = None, *, until: float | None = None) -> Info:
        """A repo at `revision` (default: the newest commit of its main branch), with its files; it is not asked for
        again after the time `until`. Raises Refuse (`gone`, `gated`, `malformed`) and Trouble."""
        what = f"{repo}{f'@{revision}' if revision else ''}"
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        info, _ = self._page(what, f"{self._model(repo)}{at}?blobs=true", model_of, until)
        if is_sha(revision) and info.sha != revision:
            raise Trouble(f"{what}: the Hub answers with another commit, {info.sha}; nothing was settled", Fault.SERVER)
        if any(file.size < 0 for file in info.files.values()):  # mirrors do not tell sizes here
            info = replace(info, files=self._tree(repo, info.sha, what))
        return info

    def _tree(self, repo: str, sha: str, what: str) -> dict[str, RemoteFile]:
        files: dict[str, RemoteFile] = {}
        url: str | None = f"{self._model(repo)}/tree/{sha}?recursive=true"
        seen: set[str] = set()
        while url is not None:
            if url in seen or len(files) > MOST_FILES or len(seen) >= _TREE:
                raise DoesNotFit(f"{what}: the list of its files has no end", repo, sha)
            seen.add(url)
            page, answer = self._page(what, url, tree_of)
            files |= page
            url = self._following(what, answer)
        return files

    def listing(
        self, *, tag: str | None = None, author: str | None = None, start: str | None = None, budget: Budget
    ) -> Iterator[Info | Misfit]:
        """Models with a tag, or of an author, newest commit first; a page is fetched when it is needed. `start`: the
        `rest` of an earlier budget, to go on there. Raises Refuse (`gone`), Trouble.

        The client's own `list_models` waits out a rate limit for minutes and cannot be stopped, so pages are asked for
        here.
        """
        what = f"models of {author}" if author else f"models with {tag}"
        words = [("sort", "lastModified"), *(("expand", word) for word in _LISTED)]
        words.append(("author", author) if author else ("filter", tag or ""))
        url: str | None = f"{self.endpoint}{start or f'/api/models?{urlencode(words)}'}"
        seen = set()
        while url is not None:
            if budget.spent:
                budget.rest = url.removeprefix(self.endpoint)
                return
            if url in seen:
                raise Trouble(f"{what}: the Hub's pages lead in a circle; nothing was settled", Fault.SERVER)
            seen.add(url)
            budget.pages -= 1
            rows, answer = self._page(what, url, models_of, budget.until)
            yield from rows
            url = self._following(what, answer)

    def history(self, repo: str, revision: str) -> list[str]:
        """The commits before `revision`, newest first, at most some thousands. Raises Refuse (`gone`) if there is no
        such commit, Trouble."""
        what = f"history of {repo}@{revision[:12]}"
        url: str | None = f"{self._model(repo)}/commits/{quote(revision, safe='')}"
        found: list[str] = []
        for _ in range(_HISTORY):
            if url is None:
                break
            page, answer = self._page(what, url, commits_of)
            found += page
            url = self._following(what, answer)
        return found[1:]

    def tags(self, repo: str) -> dict[str, str]:
        """The tags of a repo, with the commit of each. Raises Refuse (`gone`, `gated`), Trouble."""
        return self._page(f"tags of {repo}", f"{self._model(repo)}/refs", tags_of)[0]

    def _model(self, repo: str) -> str:
        return f"{self.endpoint}/api/models/{quote(repo, safe='/')}"

    def _page(
        self, what: str, url: str, parse: Callable[[bytes, str], T], until: float | None = None
    ) -> tuple[T, Answer]:
        """What a page says, and the answer that said it."""
        from continual.hub import wire

        def once() -> tuple[T, Answer]:
            answer = wire.ask(url, self._token, self.endpoint)
            self._count(0, len(answer.body))
            return parse(answer.body, what), answer

        return self._tried(what, once, lambda: self._guard(what, wire.ANSWER_SECONDS, LARGEST_ANSWER), until=until)

    def _following(self, what: str, answer: Answer) -> str | None:
        """The address of the next page, None after the last one. Raises Trouble for one that cannot be used."""
        try:
            return next_of(answer.link, answer.url, self.endpoint)
        except Failed as error:
            raise said(what, error, "") from None

    def small(self, repo: str, sha: str, file: RemoteFile) -> bytes:
        """Reads a whole configuration file at a commit, and compares it with the hash that the Hub says. Raises as
        `fetch`, and Refuse (`config`) for a file that is too large."""
        what = f"{repo}@{sha[:12]}/{file.name}"
        if file.size > LARGEST_CONFIG:
            raise Refuse("config", f"hf://{what}: {file.size} bytes are too many for a configuration file")
        before = None
        for _ in range(2):
            data = bytearray(file.size)
            self.fetch(repo, sha, file, 0, memoryview(data))
            if same(bytes(data), file) or not is_known(file):
                return bytes(data)
            if data == before:
                raise Refuse("changed", f"{what}: has not the hash that the Hub says, though it was fetched twice")
            before = data
        raise Trouble(f"{what}: was damaged on its way; nothing was settled", Fault.TRANSPORT)

    def ask(
        self,
        what: str,
        call: Callable[[], T],
        tries: int | None = None,
        *,
        seconds: float = _CLIENTS_SECONDS,
        most: int = LARGEST_ANSWER,
    ) -> T:
        """Calls `call`, which makes one request with the package, until it succeeds or no try is left. Returns its
        result. A try may take so many `seconds`, and receive at `most` so many bytes. Raises Refuse (`gone`, `gated`)
        and Trouble, both naming `what`; Abandoned at once if continual is stopping, whatever `call` does."""
        from continual.hub import wire

        def apart() -> T:
            _timed(_CLIENTS_TIMEOUT)
            return wire.apart(call)

        return self._tried(what, apart, lambda: self._guard(what, seconds, most), tries)


def _timed(seconds: float) -> None:
    """Sets the time-out of the session that all calls of the package share: by default it waits for ever."""
    from huggingface_hub.utils import httpx

    from continual.hub import wire

    session = wire.session()
    if session.timeout != httpx.Timeout(seconds):
        session.timeout = httpx.Timeout(seconds)
