"""Reads weight files of a repo by ranges: nothing on disk, a bounded window in memory, every byte fetched once a pass,
and all of a file hashed as it passes, where the Hub says its hash.

`check_unchanged` compares the hashes: before that nothing that was read may be settled. Decision 0026 says why so.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

from blake3 import blake3

from continual.errors import Refuse
from continual.hub.answers import RemoteFile
from continual.hub.client import Hub
from continual.hub.order import Chunk, Order, cut
from continual.hub.proof import Hashing
from continual.hub.trouble import Trouble
from continual.hub.window import AHEAD, Chunked
from continual.retrying import Fault

HELD, HELD_EACH, HELD_LEAST = 256 << 20, 64 << 20, 32 << 20
"""Bytes that wait for their turn to be hashed, at most; with few workers HELD_EACH for each but the first: what one has
read of a large tensor waits while another reads the large tensor in front of it."""
NEAR = 4
"""Chunks before the one that is hashed next within which a reader is, who will read that one soon."""
PATIENCE = 5.0
"""Seconds that such a reader is waited for, before the chunk is fetched for the hash alone."""


Span = tuple[str, int, int]
"""The name of a file, the first byte, and one past the last."""


class Ranges(Chunked):
    """Files of one repo at one commit. Thread-safe. The caller closes it. `stats` have sizes only: a commit does not
    change. `extra`: bytes that were fetched for the hash alone."""

    def __init__(self, hub: Hub, repo: str, sha: str, files: Sequence[RemoteFile], workers: int | None = None) -> None:
        super().__init__(hub, repo, sha, files, workers)
        self.extra = 0
        self._order = Order(files, f"{repo}@{sha[:12]}")
        self._most_held = max(HELD_LEAST, min(HELD, (self.slots - AHEAD - 1) * HELD_EACH))
        self._extents: list[tuple[int, int, int]] = []
        self._held = [0] * len(files)
        self._at: dict[int, int] = {}
        self._taken = False

    @property
    def apart(self) -> dict[Span, bytes]:
        """The BLAKE3 hashes of what was read beside tensors that were expected, such as headers."""
        return {(self._files[file].name, at, at + n): mark for (file, at, n), mark in self._order.apart.items()}

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Hears which extents will be read, in this order. Raises as `check_unchanged` where others were read before,
        and not yet hashed."""
        wanted = sorted(set(extents))
        if self._extents not in ([], wanted):
            self.check_unchanged()
        with ExitStack() as stack:
            for lock in self._order.locks:  # a chunk that is being hashed is hashed first
                stack.enter_context(lock)
            stack.enter_context(self._ready)
            self._here.clear()
            self._at.clear()
            self._held = [0] * len(self._files)
            if wanted and wanted == self._extents:
                again = [
                    Chunk(c.file, c.start, c.stop, c.needed, c.needed, mark=c.mark, hashed=c.hashed)
                    for c in self._chunks
                ]
                self._chunks = again
            else:
                self._chunks = self._order.cover(cut(wanted, self._largest), self._largest)
            self._extents = wanted

    def check_unchanged(self) -> None:
        """Compares the hashes of the files from which tensors were read with what the Hub says. What is not hashed yet
        is fetched for that.

        Raises Trouble where bytes were damaged on their way, Refuse (`changed`) where the Hub has other bytes than it
        says.
        """
        for file, hashing in enumerate(self._order.hashes):
            if hashing is None:
                continue
            while self._taken and not self._closed and self._order.next(file) is not None:
                self._help(file)
            self._compare(file)

    def _compare(self, file: int) -> None:
        """Compares the hash of a file that was hashed to its end. Raises as `check_unchanged`."""
        hashing = self._order.hashes[file]
        if hashing is not None and hashing.at == self.stats[file].size and not hashing.fits:
            self._doubt(file, hashing.digest)

    def _doubt(self, file: int, first: str) -> None:
        """Reads a file once more whose hash was not what the Hub says, in its order and for nothing else. Raises
        Trouble or Refuse, as this shows who is wrong."""
        what = f"{self._repo}@{self._sha[:12]}/{self._files[file].name}"
        again, size = Hashing(self._files[file]), self.stats[file].size
        buffer = memoryview(bytearray(min(self._largest, size)))
        for start in range(0, size, self._largest):
            part = buffer[: min(self._largest, size - start)]
            self._fetch(file, start, part)
            again.update(part)
        if again.digest == first:
            raise Refuse("changed", f"{what}: has not the hash that the Hub says, though it was read twice")
        how = "was damaged on its way" if again.fits else "comes with other bytes each time"
        raise Trouble(f"{what}: {how}; nothing was settled", Fault.TRANSPORT)

    def _read_apart(self, file: int, into: memoryview, offset: int) -> None:
        super()._read_apart(file, into, offset)
        with self._ready:
            self._order.read_apart(file, offset, into)
        self._compare(file)  # a file that has nothing but what was read here, such as a configuration

    def _take(self, index: int) -> mmap.mmap:
        with self._ready:
            self._taken = True
            self._at[threading.get_ident()] = index
        self._wait_for_room(index)
        return super()._take(index)

    def _load(self, chunk: Chunk) -> mmap.mmap:
        data = super()._load(chunk)
        self._hash(chunk.file)
        return data

    def _came(self, chunk: Chunk, data: mmap.mmap) -> None:
        mark = blake3(data).digest()
        with self._ready:
            self._order.came(chunk, mark)

    def _read(self, chunk: Chunk, count: int) -> None:
        with self._ready:
            data = chunk.data if self._order.hashes_it(chunk) else None
            super()._read(chunk, count)
            if chunk.data is None and data is not None:  # it was read to its end, and is kept until it is hashed
                if not chunk.spent:
                    chunk.spent = True
                    self._held[chunk.file] += chunk.nbytes
                chunk.data = data

    def _hash(self, file: int) -> None:
        """Hashes what is there of a file, as far as it goes from where the hash is."""
        hashing = self._order.hashes[file]
        if hashing is None:
            return
        with self._order.locks[file]:
            while True:
                with self._ready:
                    chunk = self._next(file)
                    data = None if chunk is None else chunk.data
                if chunk is None or data is None:
                    return
                hashing.update(memoryview(data))
                with self._ready:
                    self._order.passed(chunk)
                    if chunk.spent:
                        chunk.spent, chunk.data = False, None
                        self._held[file] -= chunk.nbytes
                    elif not chunk.needed:
                        self._drop(chunk)
                    self._ready.notify_all()

    def _next(self, file: int) -> Chunk | None:
        """The chunk of a file that is hashed next."""
        index = self._order.next(file)
        return None if index is None or self._closed else self._chunks[index]

    def _help(self, file: int) -> None:
        """Brings the hash of a file on by one chunk, which is fetched if nobody does."""
        with self._ready:
            chunk = self._next(file)
            if chunk is None:
                return
            if chunk.loading:
                self._ready.wait()
                return
            here = chunk.data is not None
            if not here:
                self._make_room()
                self._begin(chunk)
                self.extra += chunk.nbytes if chunk.passes or not chunk.needed else 0
        if here:
            self._hash(file)
            return
        self._load(chunk)
        with self._ready:
            if chunk.passes and chunk.hashed and chunk.data is not None:  # its readers had it before
                self._drop(chunk)

    def _wait_for_room(self, index: int) -> None:
        """Waits while too much waits to be hashed, unless this is what the hash waits for."""
        end = time.monotonic() + PATIENCE
        while True:
            with self._ready:
                if sum(self._held) < self._most_held or self._closed:
                    return
                file = max(range(len(self._held)), key=lambda number: self._held[number])
                wanted = self._order.next(file)
                if wanted is None or (self._chunks[index].file == file and index <= wanted):
                    return
                chunk, me = self._chunks[wanted], threading.get_ident()
                near = any(who != me and wanted - NEAR <= at <= wanted for who, at in self._at.items())
                if chunk.loading or (chunk.needed and near and time.monotonic() < end):
                    self._ready.wait(0.1)
                    continue
            self._help(file)
