"""A candidate on the Hub of which several processes read a part: who reads which file whole, who reads a file once more
for its hash, and whether all that was read is what the Hub says. What a mark is, `continual.hub.marks` says.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from continual.executors.contract import Executor, Task
from continual.executors.orders import WorkJob, WorkPiece
from continual.hub.elsewhere import NotForWorker
from continual.hub.marks import FilesRead, MarksCompared
from continual.hub.proof import is_known
from continual.hub.repo import Repo
from continual.hub.trouble import Trouble
from continual.retrying import Fault
from continual.tensors import Place
from continual.tensors.vectors.vectors import Extent

R = TypeVar("R", bound="WithRead")
SMALL = 256 << 20
"""Bytes of reading up to which all that is made of a file is one order."""
LARGEST = 8 << 30
"""Bytes of the largest file that one worker reads whole."""
_NEED = 64 << 20


class WithRead(Protocol):
    """What a piece of work gave, with what was read for it in another process."""

    @property
    def read(self) -> FilesRead | None:
        """Of this piece, and of those before it in its order."""
        ...


class PieceReads(NamedTuple):
    """What a piece of work reads of the candidate's files, and how many bytes in all."""

    extents: Sequence[Extent]
    nbytes: int


@dataclass(frozen=True)
class ProofJob(WorkJob[FilesRead]):
    """Weight files of a repo, each read from end to end for its hash; `extents`: what is read of each by others."""

    place: Repo
    extents: Mapping[str, tuple[tuple[int, int], ...]]

    def open(self) -> Proving:
        """Opens nothing."""
        return Proving(self)


class Proving:
    """Reads files for their hash."""

    def __init__(self, job: ProofJob) -> None:
        self._job = job

    def work(self, names: Sequence[str]) -> list[FilesRead]:
        """Files, one after the other. Raises Refuse, Retry."""
        return [self._job.place.read_through(name, self._job.extents.get(name, ())) for name in names]

    def close(self) -> None:
        """Nothing is open."""


class PartsOfRepo:
    """The weight files `names` of a candidate, read by several processes. `full`: of a whole model, whose tensors are
    most of what is read; of an adapter the base is."""

    def __init__(self, place: Place, names: Sequence[str], pieces: Mapping[str, PieceReads], *, full: bool) -> None:
        self._place = place if isinstance(place, Repo) else None
        self._pieces, self._full = pieces, full
        self._whole: Mapping[str, str] = {}
        self._left: list[str] = []
        if self._place is None:
            return
        self._files = [self._place.info.files[name] for name in dict.fromkeys(names)]
        self._compared = MarksCompared(str(self._place).removeprefix("hf://"))

    @property
    def whole(self) -> frozenset[str]:
        """The files that are read whole by one order, and hashed as they pass."""
        streamed = self._place is not None and self._place.is_streamed
        return frozenset(self._whole.values()) if streamed else frozenset()

    def begin(self, workers: int) -> None:
        """Decides who reads what, among so many workers."""
        if self._place is None:
            return
        users: dict[str, list[str]] = {file.name: [] for file in self._files}
        apart = set[str]()
        for name, piece in self._pieces.items():
            files = {extent.file for extent in piece.extents if extent.nbytes}
            for file in files:
                users.setdefault(file, []).append(name)
            if len(files) > 1:
                apart |= files
        total = sum(file.size for file in self._files)
        streamed, found = self._place.is_streamed, dict[str, str]()
        for one in self._files:
            mine = users[one.name]
            small = sum(self._pieces[name].nbytes for name in mine) <= SMALL
            share = self._full and (not streamed or (one.size <= LARGEST and one.size * workers <= total))
            if mine and one.name not in apart and (small or share):
                found.update(dict.fromkeys(mine, one.name))
        self._whole = found
        if streamed:
            known = [file.name for file in self._files if is_known(file)]
            self._left = [name for name in known if name not in self.whole]
            self._compared.add(self._place.headers_read())
            extents: dict[str, set[tuple[int, int]]] = {name: set() for name in self._left}
            for piece in self._pieces.values():
                for extent in piece.extents:
                    if extent.file in extents:
                        extents[extent.file].add((extent.start, extent.nbytes))
            sent = {name: tuple(sorted(one)) for name, one in extents.items()}
            self._job = ProofJob(secrets.token_hex(8), self._place, sent)

    def piece(self, job: WorkJob[R], name: str, *, once: bool = True) -> WorkPiece[R]:
        """A piece of work. In one that is done `once` a file that is read whole is hashed; where files are fetched
        whole all pieces of one are one order."""
        together = self._place is not None and (once or not self._place.is_streamed)
        return WorkPiece(job, name, self._whole.get(name, "") if together else "")

    def map(self, executor: Executor, tasks: Sequence[Task[R]], *, once: bool = True) -> Iterator[tuple[str, R]]:
        """As `Executor.map`; what is done `once` is proved, by further tasks. Raises Trouble where two processes read
        other bytes, Refuse (`changed`) where a file is not what the Hub says, Retry."""
        both: list[Task[Any]] = []
        for task in tasks:
            both += [*(self._proofs(task.name) if once else ()), task]
        both += self._proofs() if once else ()
        with self._reading():
            for name, found in executor.map(both):
                read: FilesRead | None = found if isinstance(found, FilesRead) else found.read
                if read is not None and self._place is not None:
                    self._compared.add(read)
                if not isinstance(found, FilesRead):
                    yield name, found
        if once and self._place is not None and executor.elsewhere and self._place.is_streamed:
            self._compared.check(self._files)

    def _proofs(self, name: str | None = None) -> Iterator[Task[FilesRead]]:
        """The reading for hashes of the files that this piece of work reads, unless they were given before; of all that
        are left where none is named."""
        piece = None if name is None else self._pieces.get(name)
        wanted = {extent.file for extent in piece.extents} if piece is not None else set()
        for file in [file for file in self._left if name is None or file in wanted]:
            assert self._place is not None
            self._left.remove(file)
            yield Task(file, _NEED, WorkPiece(self._job, file, file), reads=self._place.info.files[file].size)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """While workers read. Where one may not, or finds nothing, the verdict of this process counts: raises Refuse
        (`gone`, `gated`) where it is the same here, else Trouble."""
        try:
            yield
        except NotForWorker as error:
            if self._place is None:  # a base from the Hub
                raise Trouble(f"{error}; nothing was settled", Fault.DENIED) from error
            self._place.must_be_readable(self._files[0].name)
            raise Trouble(
                f"{error}; this machine may read it: give that one a login of the Hub that may, too (HF_TOKEN, or "
                "'hf auth login'); nothing was settled",
                Fault.DENIED,
            ) from error


def parts_read(place: Place) -> FilesRead | None:
    """What this process read of a candidate that was sent to it; None of one that is not on the Hub. Raises Refuse and
    Trouble where it is not what the Hub says."""
    return place.parts_read() if isinstance(place, Repo) else None
