"""A repo of the Hub at one commit, as a place: headers and configuration are read by ranges, weights by ranges or
through the client's cache.

The Hub is asked for the commit once. Whatever happens to the repo afterwards, every byte is of that commit, or the
candidate is refused. A process to which a repo was sent reads the same commit, and asks for nothing that was asked.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from continual.errors import Refuse, Skip
from continual.hub.answers import Info, RemoteFile
from continual.hub.client import Hub
from continual.hub.elsewhere import hub_of_worker, without_login
from continual.hub.marks import FilesRead, PartReader, read_through
from continual.hub.names import is_sha
from continual.hub.proof import is_known, same
from continual.hub.ranges import Ranges
from continual.hub.trouble import Trouble
from continual.outside import shown
from continual.records import SCHEME, FileStat
from continual.retrying import Fault
from continual.tensors.checkpoints.files import LARGEST_CONFIG, Files
from continual.tensors.checkpoints.place import Weights, is_within

_ETAG_SECONDS = 20.0
_DOWNLOAD_SECONDS, _SLOWEST = 600.0, 20_000
"""A download has failed after so many seconds, and one for so many bytes."""
_SLACK = 32 << 20
"""Bytes that a download may take besides the file: what was packed, or is asked for again."""
Hear = Callable[[Info], None]
"""A function that is called with what the Hub says of a repo."""


class Access(NamedTuple):
    """How a repo is read, and when it is refused.

    `read`: weights by ranges with nothing on disk (`stream`), or through the cache of the Hub's client (`cache`).
    `workers`: how many threads read at a time; None: one a core. `newest`: the commit must still be the newest one of
    the repo; a commit that a newer one has replaced is refused as `superseded`. `vet` raises Skip for a repo that the
    settings leave out. `newer` is called with the commit that has replaced the one asked for.
    """

    read: Literal["stream", "cache"] = "stream"
    workers: int | None = None
    newest: bool = False
    vet: Hear | None = None
    newer: Hear | None = None


STREAMED = Access()


class SentRepo(NamedTuple):
    """A repo for another process: the endpoint without a login, what the Hub said of it, who saw it, how it is read,
    its small files and the beginnings of others, as far as they were read."""

    endpoint: str
    info: Info
    source: str
    read: Literal["stream", "cache"]
    small: dict[str, bytes]
    heads: dict[str, bytes]

    def arrived(self) -> Repo:
        """It, in that process, which has a login of its own. Raises Misconfigured."""
        access = Access(self.read, workers=1)
        found = Repo(hub_of_worker(self.endpoint), self.info.id, self.info.sha, source=self.source, access=access)
        found.take_over(self)
        return found


class Repo:
    """A model repo. It is lazy: the Hub is asked when the first answer is needed.

    `revision` is a commit, a branch or a tag; a branch or tag is resolved to its commit once. None: the newest commit.
    `whole`: the weight files that this process reads all of, where several read of them (`parts_read`).
    """

    only = None

    def __init__(
        self, hub: Hub, repo: str, revision: str | None = None, *, source: str = "hand", access: Access = STREAMED
    ) -> None:
        self.hub = hub
        self.name = repo
        self.origin = f"{SCHEME}{repo}"
        self.source = source
        self._revision = revision
        self._access = access
        self._info: Info | None = None
        self._small: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._opened = weakref.WeakSet[Ranges]()
        self._heads: dict[str, bytes] | None = None
        self.whole: Collection[str] = ()

    def __reduce__(self) -> tuple[object, ...]:
        heads = {name: head for opened in self._opened for name, head in opened.heads.items()}
        sent = SentRepo(without_login(self.hub.endpoint), self.info, self.source, self._access.read, self._small, heads)
        return SentRepo.arrived, (sent,)

    def take_over(self, sent: SentRepo) -> None:
        """Becomes what another process has sent."""
        self._info, self._small, self._heads = sent.info, sent.small, sent.heads

    @property
    def is_streamed(self) -> bool:
        """Whether its weights are read by ranges. Else no byte is used of a file whose hash was not compared."""
        return self._access.read == "stream"

    def parts_read(self) -> FilesRead | None:
        """What was read of it by this process since it was asked last, where the repo was sent to it; None where this
        process compares by itself. Raises as `Weights.check_unchanged`."""
        if self._heads is None:
            return None
        found = [opened.take() for opened in self._opened if isinstance(opened, PartReader)]
        marks = {span: mark for one in found for span, mark in one.marks.items()}
        return FilesRead(marks, frozenset().union(*(one.proved for one in found)))

    def headers_read(self) -> FilesRead:
        """The headers that were read of it."""
        apart = (span for opened in self._opened for span in opened.apart.items())
        return FilesRead({span: mark for span, mark in apart if span[1] in (0, 8)}, frozenset())

    def read_through(self, name: str, extents: Sequence[tuple[int, int]]) -> FilesRead:
        """Reads a weight file from end to end, as `marks.read_through` says. Raises Refuse and Trouble."""
        return read_through(self.hub, self.name, self.info.sha, self._file(name), extents)

    def must_be_readable(self, name: str) -> None:
        """Raises Refuse (`gone`, `gated`) or Trouble where the commit, or the first byte of a file, cannot be had."""
        file = self._file(name)
        self.hub.info(self.name, self.info.sha)  # a link that was got before may still do
        self.hub.fetch(self.name, self.info.sha, file, 0, memoryview(bytearray(min(1, file.size))))

    @property
    def info(self) -> Info:
        """The repo at its commit. Raises Refuse (`gone`, `gated`, `superseded`), Trouble, and Skip where the settings
        leave it out.

        The Hub answers for a renamed repo under its new name; from then on this place has the new name, too.
        """
        with self._lock:
            if self._info is None:
                found = self._found()
                if self._access.newest and self._revision not in (None, found.sha):
                    self._superseded(found)
                if self._access.vet is not None:
                    self._access.vet(found)
                self.name, self.origin, self._info = found.id, f"{SCHEME}{found.id}", found
            return self._info

    def _found(self) -> Info:
        """Asks the Hub for the repo. Raises Refuse and Trouble; Skip for a repo that is gone and of which no commit is
        known: there is no key under which it could be settled."""
        try:
            return self.hub.info(self.name, None if self._access.newest else self._revision)
        except Refuse as error:
            if self._access.newest and self._revision is None:
                raise Skip(str(error)) from None
            raise

    def _superseded(self, head: Info) -> None:
        """Decides between two commits: raises Refuse (`superseded`) if `head` came after ours, Trouble if the Hub
        answers with an older one, and Skip where the settings leave the repo out."""
        assert self._revision is not None
        try:
            before = self.hub.history(self.name, self._revision)
        except Refuse:  # our commit is gone: somebody rewrote the history of the repo
            before = []
        if head.sha in before:
            raise Trouble(f"{self}: the Hub answers with an older commit; nothing was settled", Fault.TRANSPORT)
        if self._access.vet is not None:
            self._access.vet(head)
        if self._access.newer is not None:
            self._access.newer(head)
        raise Refuse("superseded", f"{self}: {head.sha[:12]} came after it, and is looked at in its place")

    @property
    def revision(self) -> str | None:
        """The commit once the Hub was asked; before that the revision that was given."""
        return self._info.sha if self._info else self._revision

    @property
    def settled_key(self) -> str | None:
        """The candidate's key, or None while the commit is not known."""
        return f"hub:{self.name}@{self.revision}" if is_sha(self.revision) else None

    @property
    def licence(self) -> str | None:
        """The licence that the card of the repo names; None before the Hub was asked."""
        return (self._info.licence or None) if self._info else None

    def __str__(self) -> str:
        revision = self.revision
        return self.origin if revision is None else f"{self.origin}@{revision[:12] if is_sha(revision) else revision}"

    def file(self, name: str) -> str:
        """How messages name a file of the repo."""
        return f"{self}/{name}"

    def must_be_there(self) -> None:
        """Asks the Hub for the repo, unless that was done. Raises as `info`."""
        _ = self.info  # the property raises

    def names(self, folder: str = "") -> frozenset[str]:
        """Names of the files at the top level of the repo, or in a folder of it. Raises as `info`, and Refuse
        (`outside`)."""
        head = f"{self._inside(folder)}/" if folder else ""
        found = (name.removeprefix(head) for name in self.info.files if name.startswith(head))
        return frozenset(name for name in found if "/" not in name)

    def present(self, name: str) -> bool:
        """Whether the commit has a file of this name."""
        return self._inside(name) in self.info.files

    def small(self, name: str) -> bytes:
        """The contents of a configuration file of at most 64 MiB. It is fetched once and kept. Raises Refuse
        (`no-file`, `config`, `changed`) and Trouble."""
        if self._inside(name) not in self._small:
            file = self._file(name)
            self._small[name] = self.hub.small(self.name, self.info.sha, file)
        return self._small[name]

    def open(self, names: Sequence[str]) -> Weights:
        """Opens files for reading: by ranges, or through the cache where `Access.read` says so and there are weights
        among them. Raises Refuse (`no-file`) and Trouble."""
        files = [self._file(name) for name in names]
        ranges = self._ranges(files)
        cached = self._access.read == "cache" and any(name.endswith(".safetensors") for name in names)
        return Cached(ranges, self.hub, self.name, self.info.sha, files) if cached else ranges

    def _ranges(self, files: Sequence[RemoteFile]) -> Ranges:
        if self._heads is None:
            found = Ranges(self.hub, self.name, self.info.sha, files, self._access.workers)
        else:
            found = PartReader(self.hub, self.name, self.info.sha, files, self._heads, self.whole)
        self._opened.add(found)
        return found

    def files(self) -> frozenset[str]:
        """All files of the commit. Raises as `info`."""
        return frozenset(self.info.files)

    def sha256(self, name: str) -> str:
        """As the Hub says it of a file in LFS; small ones are fetched. Raises as `small`, and Refuse (`signature`) for
        a large file of which a mirror says no hash."""
        file = self._file(name)
        if file.sha256:
            return file.sha256
        if file.size > LARGEST_CONFIG:
            raise Refuse("signature", f"{self.file(name)}: the Hub says no SHA-256 of it")
        return hashlib.sha256(self.small(name)).hexdigest()

    def look(self) -> tuple[FileStat, ...]:
        """The weight files of the commit; none before the Hub was asked."""
        files = self._info.files.values() if self._info else ()
        return tuple(FileStat(f.name, f.size, 0, 0) for f in files if f.name.endswith(".safetensors"))

    def key(self, files: Sequence[FileStat]) -> str:  # noqa: ARG002
        """The candidate's key: the repo and the commit, which says what every file holds."""
        return self.settled_key or f"hub:{self.name}@{self.info.sha if self._info else self._revision}"

    def _inside(self, name: str) -> str:
        if not is_within(name):
            raise Refuse("outside", f"{self}: {shown(name)} is no path of a file in it")
        return name

    def _file(self, name: str) -> RemoteFile:
        found = self.info.files.get(self._inside(name))
        if found is None:
            raise Refuse("no-file", f"{self.file(name)}: is not in this commit")
        return found


class Cached:
    """Weight files read through the cache of the Hub's client (HF_HOME). Headers are read by ranges; a whole file is
    fetched when the first of its tensors is read.

    Before a byte of a fetched file is used, its SHA-256 is compared with the one that the Hub names.
    """

    def __init__(self, ranges: Ranges, hub: Hub, repo: str, sha: str, files: Sequence[RemoteFile]) -> None:
        self.stats = ranges.stats
        self._ranges, self._hub, self._repo, self._sha, self._remote = ranges, hub, repo, sha, files
        self._expected = False
        self._local: dict[int, Files] = {}
        self._locks = [threading.Lock() for _ in files]

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:  # noqa: ARG002
        """Hears that headers are done and tensors follow."""
        self._expected = True

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Does nothing: a file is fetched as a whole."""

    def look_again(self, file: int) -> None:
        """As that of `Ranges`."""
        self._ranges.look_again(file)

    def check_unchanged(self) -> None:
        """Raises Retry if somebody changed a file of the cache since it was opened."""
        for files in self._local.values():
            files.check_unchanged()

    def close(self) -> None:
        """Closes every open file."""
        self._ranges.close()
        while self._local:
            self._local.popitem()[1].close()

    def pread(self, file: int, length: int, offset: int) -> bytes:
        """Reads `length` bytes at `offset`. Raises Refuse and Trouble."""
        data = bytearray(length)
        self.preadv(file, memoryview(data), offset)
        return bytes(data)

    def preadv(self, file: int, into: memoryview, offset: int) -> None:
        """Fills `into` with the bytes from `offset` on. Raises Refuse and Trouble."""
        if not self._expected:
            self._ranges.preadv(file, into, offset)
            return
        with self._locks[file]:
            if file not in self._local:
                self._local[file] = Files([download(self._hub, self._repo, self._sha, self._remote[file])], None)
        self._local[file].preadv(0, into, offset)


def download(hub: Hub, repo: str, sha: str, file: RemoteFile) -> Path:
    """The path of a file of a commit in the cache of the Hub's client (HF_HOME). The file is fetched unless it is
    there, and its hash is compared with the one that the Hub names.

    Raises Refuse (`gone`, `gated`, `changed`) and Trouble.
    """
    from huggingface_hub import hf_hub_download

    what = f"{repo}@{sha[:12]}/{file.name}"
    for force in (False, True):  # a file in the cache can be damaged; then it is fetched again
        fetch = partial(
            hf_hub_download,
            repo,
            file.name,
            revision=sha,
            endpoint=hub.endpoint,
            token=hub.api.token,
            etag_timeout=_ETAG_SECONDS,
            force_download=force,
        )
        path = Path(hub.ask(what, fetch, seconds=_DOWNLOAD_SECONDS + file.size / _SLOWEST, most=file.size + _SLACK))
        if same(path, file) or (not is_known(file) and path.stat().st_size == file.size):
            return path
    raise Refuse(
        "changed", f"{what}: its contents do not have the hash that the Hub says, even after a second download"
    )
