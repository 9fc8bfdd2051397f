"""What several processes read of one commit, each a part: the hashes of what came (marks), which are compared with
those of who reads a file from end to end, and compares its hash with what the Hub says.

So no byte that was used is one that nobody hashed, as where one process reads all (`continual.hub.ranges`). Marks are
of whole tensors, or of the parts that a large one is always cut into: whoever reads a tensor makes the same ones.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3

from continual.errors import Retry
from continual.hub.answers import RemoteFile
from continual.hub.client import Hub
from continual.hub.order import Chunk, Order
from continual.hub.proof import is_known
from continual.hub.ranges import Ranges, Span
from continual.hub.trouble import differs
from continual.tensors.checkpoints.header import LONGEST

_PIECE = 1 << 20


class FilesRead(NamedTuple):
    """What was read: the mark of each span, and the files whose hash was compared with what the Hub says."""

    marks: Mapping[Span, bytes]
    proved: frozenset[str]


class PartReader(Ranges):
    """Files of which this process reads a part, for one who compares what all of them read. One thread reads. Those
    that are `whole` come in one order, and are hashed as they pass. `heads`: the first bytes of files, as they were
    read before."""

    def __init__(
        self,
        hub: Hub,
        repo: str,
        sha: str,
        files: Sequence[RemoteFile],
        heads: Mapping[str, bytes],
        whole: Collection[str] = (),
    ) -> None:
        super().__init__(hub, repo, sha, files, workers=1)
        self._heads = {number: heads[file.name] for number, file in enumerate(files) if file.name in heads}
        self._whole = frozenset(whole)
        self._marks: dict[Span, bytes] = {}
        self._where = f"{repo}@{sha[:12]}"
        self._order = Order(files, self._where, ())

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Hears what the next order reads. Raises as `check_unchanged` of what the last one read."""
        self.check_unchanged()
        reads = {self._files[file].name for file, _, nbytes in extents if nbytes}
        apart, self._extents = self._order.apart, []
        self._order = Order(self._files, self._where, reads & self._whole)
        self._order.apart = apart
        for file, hashing in enumerate(self._order.hashes):
            if hashing is not None:  # the bytes of the header that were used are those that are hashed
                self._read_header(file)
        super().expect(extents)

    def _read_header(self, file: int) -> None:
        said = bytearray(8)
        self._read_apart(file, memoryview(said), 0)
        length = int.from_bytes(said, "little")
        if length > LONGEST or 8 + length > self.stats[file].size:  # who found the file has parsed it
            raise differs(self._where, self._files[file].name)
        self._read_apart(file, memoryview(bytearray(length)), 8)

    def take(self) -> FilesRead:
        """What was read since this was asked last. Raises as `check_unchanged`."""
        self._taken = True  # what is whole is hashed to its end, whatever was read of it
        self.check_unchanged()
        hashes = zip(self._files, self._order.hashes, strict=True)
        proved = frozenset(file.name for file, one in hashes if one is not None and one.at == file.size)
        marks, self._marks = self._marks | self.apart, {}
        return FilesRead(marks, proved)

    def _came(self, chunk: Chunk, data: mmap.mmap) -> None:
        super()._came(chunk, data)
        name = self._files[chunk.file].name
        for start, stop in self._parts(chunk):
            mark = blake3(memoryview(data)[start - chunk.start : stop - chunk.start]).digest()
            with self._ready:
                if self._marks.setdefault((name, start, stop), mark) != mark:
                    raise differs(self._where, name)

    def _parts(self, chunk: Chunk) -> Iterator[tuple[int, int]]:
        """The tensors that lie in a chunk; itself, where it is a part of one."""
        at = bisect_left(self._extents, (chunk.file, chunk.start, 0))
        whole = 0
        for file, start, nbytes in self._extents[at:]:
            if file != chunk.file or start >= chunk.stop:
                break
            if nbytes and start + nbytes <= chunk.stop:
                whole += nbytes
                yield start, start + nbytes
        if chunk.needed and not whole:
            yield chunk.start, chunk.stop


def read_through(hub: Hub, repo: str, sha: str, file: RemoteFile, extents: Sequence[tuple[int, int]]) -> FilesRead:
    """Reads a weight file from end to end, and compares its hash with what the Hub says; the marks of its header and of
    `extents` (first byte, bytes). Raises Trouble where it was damaged on its way, Refuse (`changed`) where it is
    another, and as `Hub.fetch`."""
    reader = PartReader(hub, repo, sha, [file], {}, [file.name])
    try:
        reader.expect([(0, start, nbytes) for start, nbytes in extents])
        piece = memoryview(bytearray(_PIECE))
        for start, nbytes in sorted(extents):
            for at in range(start, start + nbytes, _PIECE):
                reader.preadv(0, piece[: min(_PIECE, start + nbytes - at)], at)
        return reader.take()
    finally:
        reader.close()


class MarksCompared:
    """What all processes read of one commit, compared as it comes. `where` names the repo and its commit."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._marks: dict[Span, bytes] = {}
        self._proved: set[str] = set()
        self._covered: set[Span] = set()

    def add(self, found: FilesRead) -> None:
        """Hears of what a process read. Raises Trouble where it got other bytes than another did."""
        for span, mark in found.marks.items():
            if self._marks.setdefault(span, mark) != mark:
                raise differs(self._where, span[0])
        self._proved |= found.proved
        self._covered |= {span for span in found.marks if span[0] in found.proved}

    def check(self, files: Iterable[RemoteFile]) -> None:
        """Raises Retry naming a file of which something was read that nobody compared with what the Hub says; one of
        which it says no hash cannot be."""
        known = {file.name for file in files if is_known(file)}
        lacking = {name for name, _, _ in self._marks.keys() - self._covered} | (known - self._proved)
        for name in sorted(lacking & known):
            raise Retry(f"{self._where}/{name}: was read, and not compared with what the Hub says; nothing was settled")
