"""The file of a chunk, written or read in order and in pieces. On a disk each piece is written and read there; an
object is written as a whole once its last byte is known, and read by ranges, of which the last is kept. No knowledge of
what is in it."""

from __future__ import annotations

import os
from typing import Protocol

from continual.state.durable import write_all
from continual.state.storing import Stem
from continual.stores import ObjectPath

_RANGE = 4 << 20
"""Bytes that are asked for at the least: a request takes as long as about so many bytes."""


class NewChunk(Protocol):
    """A file being written. Not synced."""

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes."""

    def skip(self, count: int) -> None:
        """So many zeros are next."""

    def finish(self) -> None:
        """All is written."""

    def close(self) -> None:
        """Writes no more."""


class OldChunk(Protocol):
    """A file being read, of `nbytes`."""

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""

    def read_into(self, into: memoryview, at: int) -> int:
        """Fills `into`, or its beginning, with the bytes from `at` on; returns how many there were, 0 at the end."""

    def read(self, count: int, at: int) -> bytes:
        """So many bytes from `at` on, or fewer where it ends before."""

    def close(self) -> None:
        """Reads no more."""


def new(path: Stem, nbytes: int) -> NewChunk:
    """A new file that will have so many bytes. Raises OSError."""
    return _NewObject(path, nbytes) if isinstance(path, ObjectPath) else _NewFile(path)


def old(path: Stem) -> OldChunk:
    """A file that is there. Raises OSError."""
    return _OldObject(path) if isinstance(path, ObjectPath) else _OldFile(path)


class _NewFile:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        write_all(self._fd, data)

    def skip(self, count: int) -> None:
        os.lseek(self._fd, count, os.SEEK_CUR)  # a hole, for which the file system keeps no block

    def finish(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._fd)


class _NewObject:
    def __init__(self, path: ObjectPath, nbytes: int) -> None:
        self._path = path
        self._data = bytearray(nbytes)
        self._at = 0

    def write(self, data: bytes | memoryview) -> None:
        self._data[self._at : self._at + len(data)] = data
        self._at += len(data)

    def skip(self, count: int) -> None:
        self._at += count

    def finish(self) -> None:
        assert self._at == len(self._data), "fewer bytes than the file has"
        self._path.objects.put(self._path.key, self._data)

    def close(self) -> None:
        self._data = bytearray()


class _OldFile:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.nbytes = os.fstat(self._fd).st_size

    def read_into(self, into: memoryview, at: int) -> int:
        return os.preadv(self._fd, [into], at)

    def read(self, count: int, at: int) -> bytes:
        return os.pread(self._fd, count, at)

    def close(self) -> None:
        os.close(self._fd)


class _OldObject:
    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._first = 0
        self._kept, self.nbytes = path.objects.get(path.key, 0, _RANGE)

    def read_into(self, into: memoryview, at: int) -> int:
        if not self._first <= at < self._first + len(self._kept):
            if at >= self.nbytes:
                return 0
            # what is left of the chunk behind this piece, its checksum, comes along
            stop = min(self.nbytes, max(at + len(into) + 4, at + _RANGE))
            self._first = at
            self._kept, _ = self._path.objects.get(self._path.key, at, stop)
        found = self._kept[at - self._first :][: len(into)]
        into[: len(found)] = found
        return len(found)

    def read(self, count: int, at: int) -> bytes:
        found = bytearray(count)
        done = 0
        while done < count and (more := self.read_into(memoryview(found)[done:], at + done)):
            done += more
        return bytes(found[:done])

    def close(self) -> None:
        self._kept = memoryview(b"")
