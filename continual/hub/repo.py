"""A repo of the Hub at one commit as a place where a model is: headers and configuration by ranges, weights by ranges
or through the client's cache.

The commit is found out once and pinned; whatever happens to the repo afterwards, what is read is of that commit or is
refused.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from continual.errors import Refuse, Skip
from continual.hub.client import TIMEOUT, Hub, Info, RemoteFile, Trouble
from continual.hub.names import SCHEME, is_sha
from continual.hub.ranges import Ranges
from continual.records import FileStat
from continual.retrying import Fault
from continual.tensors.files import LARGEST_CONFIG, Files
from continual.tensors.place import Weights

Vet = Callable[[Info], None]
"""Raises for a repo that the settings leave out."""
Newer = Callable[[Info], None]
"""Hears of the commit that came after the one that was asked for."""


class Repo:
    """A model repo. Lazy: nothing is asked before something has to be known.

    `revision` is a commit, or a branch or tag that is resolved once, default the newest commit. `newest`: the commit
    has to be the newest one, as it was when a source saw it; what came after it takes its place.
    """

    only = None

    def __init__(
        self,
        hub: Hub,
        repo: str,
        revision: str | None = None,
        *,
        source: str = "hand",
        read: Literal["stream", "cache"] = "stream",
        newest: bool = False,
        vet: Vet | None = None,
        newer: Newer | None = None,
        workers: int | None = None,
    ) -> None:
        self.hub = hub
        self.name = repo
        self.origin = f"{SCHEME}{repo}"
        self.source = source
        self._revision = revision
        self._read = read
        self._newest = newest
        self._vet = vet
        self._newer = newer
        self._workers = workers
        self._info: Info | None = None
        self._small: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def info(self) -> Info:
        """The repo at its commit. Raises Refuse (`gone`, `gated`, `superseded`), Trouble, and what the settings say of
        it.

        A repo that was renamed answers under its new name, which is then its name here, too.
        """
        with self._lock:
            if self._info is None:
                found = self._found()
                if self._newest and self._revision not in (None, found.sha):
                    self._superseded(found)
                if self._vet is not None:
                    self._vet(found)
                self.name, self.origin, self._info = found.id, f"{SCHEME}{found.id}", found
            return self._info

    def _found(self) -> Info:
        """What the Hub says. Raises Refuse, Trouble, and Skip for a repo that is gone of which no commit is known:
        there is nothing to settle."""
        try:
            return self.hub.info(self.name, None if self._newest else self._revision)
        except Refuse as error:
            if self._newest and self._revision is None:
                raise Skip(str(error)) from None
            raise

    def _superseded(self, head: Info) -> None:
        """Raises Refuse (`superseded`) if `head` came after the commit that is meant, Trouble if the Hub only lags
        behind it, and what the settings say of it."""
        assert self._revision is not None
        try:
            before = self.hub.history(self.name, self._revision)
        except Refuse:  # it is in the repo no more: the history was written anew
            before = []
        if head.sha in before:
            raise Trouble(f"{self}: the Hub answers with an older commit; nothing was settled", Fault.TRANSPORT)
        if self._vet is not None:
            self._vet(head)
        if self._newer is not None:
            self._newer(head)
        raise Refuse("superseded", f"{self}: {head.sha[:12]} came after it, and is looked at in its place")

    @property
    def revision(self) -> str | None:
        """The commit, where it is known yet."""
        return self._info.sha if self._info else self._revision

    @property
    def settled_key(self) -> str | None:
        """Its key, where the commit is known."""
        return f"hub:{self.name}@{self.revision}" if is_sha(self.revision) else None

    @property
    def licence(self) -> str | None:
        """The licence that its card names, once the repo was asked for."""
        return (self._info.licence or None) if self._info else None

    def __str__(self) -> str:
        revision = self.revision
        return self.origin if revision is None else f"{self.origin}@{revision[:12] if is_sha(revision) else revision}"

    def file(self, name: str) -> str:
        """Its address."""
        return f"{self}/{name}"

    def must_be_there(self) -> None:
        """Asks for it. Raises as `info`."""
        _ = self.info

    def names(self) -> frozenset[str]:
        """Files at its top level."""
        return frozenset(name for name in self.info.files if "/" not in name)

    def present(self, name: str) -> bool:
        """Whether the commit has it."""
        return name in self.info.files

    def small(self, name: str) -> bytes:
        """At most 32 MiB; kept, so that it is fetched once."""
        if name not in self._small:
            file = self._file(name)
            if file.size > LARGEST_CONFIG:
                raise Refuse("config", f"{self.file(name)}: {file.size} bytes are too many for a configuration file")
            self._small[name] = self.hub.small(self.name, self.info.sha, file)
        return self._small[name]

    def open(self, names: Sequence[str]) -> Weights:
        """Opens them for reading by ranges; through the cache, what was asked to be read that way and is more than
        configuration."""
        files = [self._file(name) for name in names]
        ranges = Ranges(self.hub, self.name, self.info.sha, files, self._workers)
        cached = self._read == "cache" and any(name.endswith(".safetensors") for name in names)
        return Cached(ranges, self.hub, self.name, self.info.sha, files) if cached else ranges

    def look(self) -> tuple[FileStat, ...]:
        """Its weight files, where they were asked for."""
        files = self._info.files.values() if self._info else ()
        return tuple(FileStat(f.name, f.size, 0, 0) for f in files if f.name.endswith(".safetensors"))

    def key(self, files: Sequence[FileStat]) -> str:  # noqa: ARG002
        """The repo and the commit: what its files are follows from it."""
        return self.settled_key or f"hub:{self.name}@{self.info.sha if self._info else self._revision}"

    def _file(self, name: str) -> RemoteFile:
        found = self.info.files.get(name)
        if found is None:
            raise Refuse("no-file", f"{self.file(name)}: is not in this commit")
        return found


class Cached:
    """Weight files through the cache of the Hub's client (HF_HOME): headers by ranges, all of a file when a tensor of
    it is asked for.

    A file's SHA-256 is compared with what the Hub says of it before a byte is used.
    """

    def __init__(self, ranges: Ranges, hub: Hub, repo: str, sha: str, files: Sequence[RemoteFile]) -> None:
        self.stats = ranges.stats
        self._ranges, self._hub, self._repo, self._sha, self._remote = ranges, hub, repo, sha, files
        self._expected = False
        self._local: dict[int, Files] = {}
        self._locks = [threading.Lock() for _ in files]

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:  # noqa: ARG002
        """From now on reading is of tensors."""
        self._expected = True

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Nothing: the whole file is fetched at once."""

    def check_unchanged(self) -> None:
        """Raises Retry if a file of the cache was changed meanwhile."""
        for files in self._local.values():
            files.check_unchanged()

    def close(self) -> None:
        """Closes what is open."""
        self._ranges.close()
        while self._local:
            self._local.popitem()[1].close()

    def pread(self, file: int, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`."""
        data = bytearray(length)
        self.preadv(file, memoryview(data), offset)
        return bytes(data)

    def preadv(self, file: int, into: memoryview, offset: int) -> None:
        """Fills `into` from `offset`. Raises Refuse and Trouble."""
        if not self._expected:
            self._ranges.preadv(file, into, offset)
            return
        with self._locks[file]:
            if file not in self._local:
                self._local[file] = Files([download(self._hub, self._repo, self._sha, self._remote[file])], None)
        self._local[file].preadv(0, into, offset)


def download(hub: Hub, repo: str, sha: str, file: RemoteFile) -> Path:
    """A file of a commit in the cache of the Hub's client (HF_HOME), fetched unless it is there; its hash is what the
    Hub says.

    Raises Refuse (`gone`, `gated`, `changed`) and Trouble.
    """
    from huggingface_hub import hf_hub_download

    what = f"{repo}@{sha[:12]}/{file.name}"
    how: dict[str, Any] = {"revision": sha, "endpoint": hub.endpoint, "token": hub.api.token, "etag_timeout": TIMEOUT}
    for force in (False, True):  # what lies in the cache can have been damaged there
        path = Path(hub.ask(what, partial(hf_hub_download, repo, file.name, force_download=force, **how)))
        if same(path, file):
            return path
    raise Refuse(
        "changed", f"{what}: its contents do not have the hash that the Hub says, even after a second download"
    )


def same(contents: Path | bytes, file: RemoteFile) -> bool:
    """Whether contents are those of a file on the Hub: by SHA-256 where it is in LFS, by git's blob id elsewhere."""
    size = len(contents) if isinstance(contents, bytes) else contents.stat().st_size
    found = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(contents) if isinstance(contents, bytes) else open(contents, "rb") as opened:
        while part := opened.read(1 << 20):
            found.update(part)
    return size == file.size and found.hexdigest() == (file.sha256 or file.oid)
