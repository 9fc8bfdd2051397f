"""A bounded window in memory over files that are read by ranges.

What will be read is cut into chunks. A chunk is fetched when a reader asks for it, and the next chunks ahead of time.
It is dropped when all of it was read. At most `slots` chunks are in memory at once, and besides those that are kept
until they are hashed (`continual.hub.ranges`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from continual.errors import Abandoned
from continual.hub.answers import RemoteFile
from continual.hub.client import Hub
from continual.hub.order import Chunk
from continual.hub.trouble import differs
from continual.records import FileStat

WINDOW = 40 << 20
"""Bytes that all chunks in memory take together."""
LARGEST, SMALLEST = 8 << 20, 256 << 10
HEAD, HEADS, LEAST = 128 << 10, 512 << 10, 4 << 10
"""The first look at a file fetches its first HEAD bytes, which mostly hold the header. Where there are many files,
the looks at all of them fetch HEADS bytes together, but at least LEAST of each."""
KEPT = 4 << 20
"""Bytes of a header that are kept, to be sent to other processes; of a longer one its first HEAD bytes."""
AHEAD = 3


class Chunked:
    """Files of one repo at one commit. Thread-safe. `stats` have sizes only: a commit does not change."""

    def __init__(self, hub: Hub, repo: str, sha: str, files: Sequence[RemoteFile], workers: int | None = None) -> None:
        self.stats = tuple(FileStat(file.name, file.size, 0, 0) for file in files)
        self._hub, self._repo, self._sha, self._files = hub, repo, sha, files
        self.slots = (workers or len(os.sched_getaffinity(0))) + AHEAD
        self._largest = max(SMALLEST, min(LARGEST, WINDOW // self.slots))
        self._head = max(LEAST, min(HEAD, HEADS // max(1, len(files))))
        self._heads: dict[int, bytes] = {}
        self._chunks: list[Chunk] = []
        self._ready = threading.Condition()
        self._here: set[Chunk] = set()
        self._tick = 0
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Begins to fetch the chunk at `offset` ahead of time, if a slot is free."""
        with self._ready:
            found = self._find(file, offset)
            if found is not None and length:
                self._ahead(found, self._chunks[found].passes)

    def close(self) -> None:
        """Ends fetching and drops every chunk."""
        with self._ready:
            self._closed = True
            self._chunks = []
            self._here.clear()
            self._ready.notify_all()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def pread(self, file: int, length: int, offset: int) -> bytes:
        """Reads `length` bytes at `offset`. Raises Refuse and Trouble."""
        data = bytearray(length)
        self.preadv(file, memoryview(data), offset)
        return bytes(data)

    def preadv(self, file: int, into: memoryview, offset: int) -> None:
        """Fills `into` with the bytes from `offset` on. Raises Refuse and Trouble."""
        into = into.cast("B")
        while into:
            with self._ready:
                index = self._find(file, offset)
            if index is None:
                self._read_apart(file, into, offset)
                return
            chunk = self._chunks[index]
            count = min(len(into), chunk.stop - offset)
            data = self._take(index)
            into[:count] = memoryview(data)[offset - chunk.start : offset - chunk.start + count]
            self._read(chunk, count)
            into, offset = into[count:], offset + count

    def _read_apart(self, file: int, into: memoryview, offset: int) -> None:
        """Reads bytes that no chunk holds, such as a header: from the first bytes of the file if they reach so far."""
        end = offset + len(into)
        if end <= self._head and file not in self._heads:
            head = bytearray(min(self._head, self.stats[file].size))
            self._fetch(file, 0, memoryview(head))
            self._heads[file] = bytes(head)
        there = self._heads.get(file, b"")[offset:end]
        into[: len(there)] = there
        if len(there) < len(into):
            self._fetch(file, offset + len(there), into[len(there) :])
            known = len(self._heads.get(file, b""))
            if 0 < known == offset + len(there) and end <= KEPT and not self._chunks:
                self._heads[file] += bytes(into[len(there) :])

    def look_again(self, file: int) -> None:
        """Fetches once more what is kept of the beginning of a file. Raises Trouble where it comes with other bytes."""
        head = self._heads.get(file, b"")
        again = bytearray(len(head))
        self._fetch(file, 0, memoryview(again))
        if again != head:
            raise differs(f"{self._repo}@{self._sha[:12]}", self._files[file].name)

    @property
    def heads(self) -> dict[str, bytes]:
        """The first bytes of files, by name, as far as they were read and are kept."""
        return {self._files[number].name: head for number, head in self._heads.items()}

    def _fetch(self, file: int, start: int, into: memoryview) -> None:
        self._hub.fetch(self._repo, self._sha, self._files[file], start, into)

    def _find(self, file: int, offset: int) -> int | None:
        """The index of the chunk that holds the byte at `offset`; None if no chunk does."""
        low, high = 0, len(self._chunks)
        while low < high:
            middle = (low + high) // 2
            chunk = self._chunks[middle]
            if (chunk.file, chunk.stop) <= (file, offset):
                low = middle + 1
            else:
                high = middle
        if low < len(self._chunks) and self._chunks[low].file == file and self._chunks[low].start <= offset:
            return low
        return None

    def _take(self, index: int) -> mmap.mmap:
        """The data of a chunk. This thread fetches it unless another one does."""
        chunk = self._chunks[index]
        with self._ready:
            while chunk.loading:
                self._ready.wait()
            self._tick += 1
            chunk.used = self._tick
            data = chunk.data
            if data is None:
                self._make_room()
                self._begin(chunk)
            self._ahead(index + 1, chunk.passes)
        return data if data is not None else self._load(chunk)

    def _load(self, chunk: Chunk) -> mmap.mmap:
        # a mapping is given back as soon as it is dropped; the heap of each thread would keep some of it
        data = mmap.mmap(-1, chunk.nbytes)
        try:
            self._fetch(chunk.file, chunk.start, memoryview(data))
            self._came(chunk, data)
            with self._ready:
                chunk.data = None if self._closed else data
        finally:
            with self._ready:
                chunk.loading = False
                if chunk.data is None:
                    self._here.discard(chunk)
                self._ready.notify_all()
        return data

    def _came(self, chunk: Chunk, data: mmap.mmap) -> None:
        """Hears what came for a chunk, before anybody reads it."""

    def _begin(self, chunk: Chunk) -> None:
        chunk.loading = True
        self._here.add(chunk)

    def _read(self, chunk: Chunk, count: int) -> None:
        """Counts bytes that were read of a chunk, and drops it after the last one."""
        with self._ready:
            chunk.left -= count
            if chunk.left <= 0:
                self._drop(chunk)

    def _drop(self, chunk: Chunk) -> None:
        chunk.data, chunk.left, chunk.passes, chunk.used = None, chunk.needed, chunk.passes + 1, 0
        self._here.discard(chunk)

    def _make_room(self) -> None:
        """Drops chunks that were unused for the longest time until a slot is free: an earlier pass may have read only a
        part of them."""
        while len(self._here) >= self.slots:
            loaded = [chunk for chunk in self._here if chunk.data is not None]
            if not loaded:
                return
            self._drop(min(loaded, key=lambda chunk: chunk.used or self._tick))

    def _ahead(self, index: int, passes: int) -> None:
        """Begins to fetch the next chunks of this pass into free slots."""
        unread = sum(chunk.used == 0 for chunk in self._here)
        free = min(AHEAD - unread, self.slots - 1 - len(self._here))
        for chunk in self._chunks[index : index + AHEAD]:
            if free <= 0 or self._closed:
                return
            if chunk.loading or chunk.data is not None or chunk.passes != passes or not chunk.needed:
                continue
            self._pool = self._pool or ThreadPoolExecutor(AHEAD, "range")
            self._begin(chunk)
            free -= 1
            self._pool.submit(self._load_ahead, chunk)

    def _load_ahead(self, chunk: Chunk) -> None:
        """Fetches a chunk that no reader has asked for yet. An error is dropped here: the reader tries again, and gets
        the error then."""
        with contextlib.suppress(Exception):
            if self._closed:
                raise Abandoned("closed")
            self._load(chunk)
