"""Reading by ranges without a network: which bytes are asked for, how often, and how many are held."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import Refuse
from continual.hub import RemoteFile
from continual.hub.order import cut
from continual.hub.ranges import Ranges
from continual.hub.window import SMALLEST


class Server:
    """Stands where the client does: the bytes of files, and what was asked for."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files
        self.asked: list[tuple[int, int, int]] = []
        self.held = 0
        self.most = 0
        self.broken = False
        self._lock = threading.Lock()

    def fetch(self, _repo: str, _sha: str, file: RemoteFile, start: int, into: memoryview) -> None:
        if self.broken:
            raise Refuse("gone", "gone")
        with self._lock:
            self.asked.append((int(file.name), start, len(into)))
        into[:] = self.files[int(file.name)][start : start + len(into)]

    @property
    def sent(self) -> int:
        return sum(count for _, _, count in self.asked)


def opened(server: Server, workers: int = 2) -> Ranges:
    files = [RemoteFile(str(i), len(data), "", None) for i, data in enumerate(server.files)]
    return Ranges(server, "o/m", "1" * 40, files, workers)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50), st.integers(0, 120)), max_size=20),
    st.integers(1, 40),
    st.integers(0, 20),
)
def test_chunks_cover_what_is_read_and_little_else(parts: list[tuple[int, int, int]], largest: int, gap: int) -> None:
    extents, at = [], {0: 0, 1: 0}
    for file, space, nbytes in sorted(parts):
        extents.append((file, at[file] + space, nbytes))
        at[file] += space + nbytes
    chunks = cut(extents, largest, gap)
    covered = {(c.file, b) for c in chunks for b in range(c.start, c.stop)}
    wanted = {(file, b) for file, start, nbytes in extents for b in range(start, start + nbytes)}
    assert wanted <= covered
    assert all(0 < c.stop - c.start <= largest for c in chunks)
    assert sum(c.stop - c.start for c in chunks) == len(covered)  # nothing twice
    assert all(c.needed == sum((c.file, b) in wanted for b in range(c.start, c.stop)) for c in chunks)
    assert chunks == sorted(chunks, key=lambda c: (c.file, c.start))


def tensors(seed: int, count: int = 60) -> tuple[bytes, list[tuple[int, int, int]]]:
    """A file, and its tensors: most small, some of several chunks."""
    chance = random.Random(seed)
    sizes = [chance.choice([8, 300, 40_000, SMALLEST // 2, 3 * SMALLEST + 17]) for _ in range(count)]
    starts = [100 + sum(sizes[:i]) for i in range(count)]
    return chance.randbytes(100 + sum(sizes)), [(0, start, size) for start, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("passes", [1, 2])
def test_every_byte_is_fetched_once_a_pass_by_any_number_of_threads(workers: int, passes: int) -> None:
    data, extents = tensors(workers)
    server = Server([data])
    files = opened(server, workers)
    files.expect(extents)

    def read(extent: tuple[int, int, int]) -> bool:
        _, start, size = extent
        got = bytearray(size)
        for at in range(0, size, 1 << 18):  # in runs, as tensors are read
            files.preadv(0, memoryview(got)[at : at + (1 << 18)], start + at)
        return bytes(got) == data[start : start + size]

    with ThreadPoolExecutor(workers) as pool:
        for _ in range(passes):
            assert all(pool.map(read, extents))
    files.close()
    assert server.sent <= passes * 1.05 * sum(size for _, _, size in extents)
    assert len(server.asked) <= passes * (server.sent / passes / files._largest * 2 + 10)


def test_what_is_not_expected_is_read_apart_and_the_head_once() -> None:
    data = random.Random(1).randbytes(3 << 20)
    server = Server([data])
    files = opened(server)
    assert files.pread(0, 8, 0) == data[:8]
    assert files.pread(0, 1000, 8) == data[8:1008]
    assert len(server.asked) == 1
    assert files.pread(0, 5, 2 << 20) == data[2 << 20 : (2 << 20) + 5]
    assert server.asked[-1] == (0, 2 << 20, 5)
    files.close()


def test_a_sampling_pass_neither_fills_the_window_nor_stops() -> None:
    data, extents = tensors(3)
    server = Server([data])
    files = opened(server)
    files.expect(extents)
    for _, start, size in extents:  # a sixteenth of each
        assert files.pread(0, max(1, size // 16), start) == data[start : start + max(1, size // 16)]
    for _, start, size in extents:
        assert files.pread(0, size, start) == data[start : start + size]
    assert len([c for c in files._chunks if c.data is not None]) <= files.slots
    files.close()


def test_an_error_reaches_whoever_reads_and_later_reads_work() -> None:
    data, extents = tensors(4)
    server = Server([data])
    files = opened(server)
    files.expect(extents)
    server.broken = True
    with pytest.raises(Refuse):
        files.pread(0, 8, extents[0][1])
    server.broken = False
    assert files.pread(0, extents[0][2], extents[0][1]) == data[extents[0][1] : extents[0][1] + extents[0][2]]
    files.close()
