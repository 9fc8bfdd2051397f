"""The hashes of the files of a repo, taken in the order of their bytes while their chunks come in any order, and the
chunks that a file is cut into so that they cover it whole.

A hash such as SHA-256 can only be taken from the first byte to the last. So a chunk that was read before the one in
front of it came is kept until its turn, within limits; what no reader wants is fetched for the hash alone. What comes a
second time is compared with the first by its BLAKE3 hash, so that every byte that was used is one that was hashed.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from blake3 import blake3

from continual.hub.answers import RemoteFile
from continual.hub.proof import Hashing, is_known
from continual.hub.trouble import Trouble, differs

GAP = 16 << 10
"""Bytes between two tensors up to which one request fetches both and the gap."""


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes `start` to `stop` of a file. `needed`: bytes of it that a pass reads, 0 where it is fetched for the hash
    alone; `left`: those that this pass has still to read; `passes`: how many passes have read it to its end; `used`:
    the tick of its last use, 0 for none. `mark`: the BLAKE3 hash of what came; `hashed`: the file's hash has it;
    `spent`: read to its end, and kept until it is hashed."""

    file: int
    start: int
    stop: int
    needed: int
    left: int
    passes: int = 0
    used: int = 0
    loading: bool = False
    data: mmap.mmap | None = None
    mark: bytes | None = None
    hashed: bool = False
    spent: bool = False

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


def cut(extents: Sequence[tuple[int, int, int]], largest: int, gap: int = GAP) -> list[Chunk]:
    """Cuts `extents` (file, first byte, bytes; sorted) into chunks of at most `largest` bytes. Neighbours that are at
    most `gap` bytes apart share a chunk.

    An extent that needs several chunks shares none of them: a shared one would keep its slot until the threads of both
    extents have read it.
    """
    chunks: list[Chunk] = []
    whole = False  # whether the last chunk holds whole extents
    for file, start, nbytes in extents:
        stop, last = start + nbytes, chunks[-1] if chunks else None
        if (
            last is not None
            and whole
            and last.file == file
            and 0 <= start - last.stop <= gap
            and stop <= last.start + largest
        ):
            last.stop = stop
            last.needed = last.left = last.needed + nbytes
        elif nbytes:
            parts = -(-nbytes // largest)
            bounds = [start + nbytes * part // parts for part in range(parts + 1)]
            chunks += [Chunk(file, a, b, b - a, b - a) for a, b in itertools.pairwise(bounds)]
            whole = parts == 1
    return chunks


class Order:
    """The hashes of the files of one repo. It is called under its owner's lock, except `hash_next`, which has one for
    each file."""

    def __init__(self, files: Sequence[RemoteFile], where: str, hashed: Collection[str] | None = None) -> None:
        """`where` names the repo and its commit in messages; `hashed` the files to be hashed, where not all are."""
        self.hashes = [
            Hashing(file) if is_known(file) and (hashed is None or file.name in hashed) else None for file in files
        ]
        self.locks = [threading.Lock() for _ in files]
        self._files, self._where = files, where
        self._next = [0] * len(files)
        self._end = [0] * len(files)
        self.apart: dict[tuple[int, int, int], bytes] = {}

    def read_apart(self, file: int, offset: int, data: memoryview) -> None:
        """Hears of bytes that were read outside all chunks, such as a header. Raises Trouble if they were others
        before."""
        mark = blake3(data).digest()
        if self.apart.setdefault((file, offset, len(data)), mark) != mark:
            raise self._damaged(file)
        hashing = self.hashes[file]
        if hashing is not None and offset == hashing.at and self._next[file] == self._end[file]:
            hashing.update(data)

    def cover(self, chunks: Sequence[Chunk], largest: int) -> list[Chunk]:
        """The chunks, with others between them, so that all that is not hashed of the files is covered."""
        found: list[Chunk] = []
        ours = {file: list(group) for file, group in itertools.groupby(chunks, key=lambda chunk: chunk.file)}
        for number, (file, hashing) in enumerate(zip(self._files, self.hashes, strict=True)):
            self._next[number] = len(found)
            at = file.size if hashing is None else hashing.at
            for chunk in ours.get(number, []):
                found += _filling(number, at, chunk.start, largest)
                found.append(chunk)
                at = max(at, chunk.stop)
            found += _filling(number, at, file.size, largest)
            self._end[number] = len(found) if hashing is not None else self._next[number]
        return found

    def next(self, file: int) -> int | None:
        """The index of the chunk that is hashed next; None if the whole file was, or is not to be."""
        return self._next[file] if self._next[file] < self._end[file] else None

    def hashes_it(self, chunk: Chunk) -> bool:
        """Whether a chunk is still to be hashed."""
        return self.hashes[chunk.file] is not None and not chunk.hashed

    def passed(self, chunk: Chunk) -> None:
        """Hears that the next chunk of a file was hashed."""
        chunk.hashed = True
        self._next[chunk.file] += 1

    def came(self, chunk: Chunk, mark: bytes) -> None:
        """Hears of the BLAKE3 hash of a chunk that came. Raises Trouble if it was another before."""
        if chunk.mark is not None and chunk.mark != mark:
            raise self._damaged(chunk.file)
        chunk.mark = mark

    def _damaged(self, file: int) -> Trouble:
        return differs(self._where, self._files[file].name)


def _filling(file: int, start: int, stop: int, largest: int) -> list[Chunk]:
    """Chunks that nobody reads."""
    return [Chunk(file, at, min(stop, at + largest), 0, 0) for at in range(start, stop, largest)]
