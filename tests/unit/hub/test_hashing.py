"""Files that are hashed while they are read by ranges: every byte that is used is one that was hashed, in any order of
reading, with little more fetched, and a bounded number of bytes kept."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from continual.errors import Refuse
from continual.hub import RemoteFile, Trouble, window
from continual.hub import ranges as module
from continual.hub.ranges import Ranges
from continual.hub.window import HEAD

MB = 64 << 10  # a megabyte of these tests, in which all else is as much smaller
HEADER = 1000
Extents = list[tuple[int, int, int]]
Spoil = Callable[[int, int, memoryview], None]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "SMALLEST", 4 * MB)
    monkeypatch.setattr(window, "LARGEST", 4 * MB)


class Store:
    """Stands where the client does: the bytes of files, how many were sent, and damage on the way: `spoil` is given the
    file, the first byte and the bytes of every answer."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = list(files)
        self.sent = 0
        self.spoil: Spoil | None = None
        self._lock = threading.Lock()

    def fetch(self, _repo: str, _sha: str, file: RemoteFile, start: int, into: memoryview) -> None:
        number = int(file.name)
        into[:] = self.files[number][start : start + len(into)]
        with self._lock:
            self.sent += len(into)
            if self.spoil is not None:
                self.spoil(number, start, into)


def opened(store: Store, workers: int = 2, said: Sequence[bytes] | None = None, git: bool = False) -> Ranges:
    """The files, with the hashes of what the Hub says they are."""
    files = []
    for number, data in enumerate(said or store.files):
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        files.append(RemoteFile(str(number), len(data), sha1, None if git else hashlib.sha256(data).hexdigest()))
    return Ranges(store, "o/m", "1" * 40, files, workers)  # type: ignore[arg-type]


def world(sizes: Sequence[int], gaps: Sequence[int] = (), files: int = 1) -> tuple[list[bytes], Extents]:
    """Files with a header, and their tensors, with gaps after some of them."""
    chance = random.Random(len(sizes))
    data: list[bytes] = []
    extents: Extents = []
    for file in range(files):
        at = HEADER
        for number, size in enumerate(sizes):
            extents.append((file, at, size))
            at += size + (gaps[number] if number < len(gaps) else 0)
        data.append(chance.randbytes(at))
    return data, extents


def read(files: Ranges, extents: Sequence[tuple[int, int, int]], workers: int, pauses: Sequence[float] = ()) -> bytes:
    """Headers, then tensors in runs by threads in the order of the files; what the first ones gave."""

    def one(number: int) -> bytes:
        file, start, size = extents[number]
        got = bytearray(size)
        for at in range(0, size, MB // 4):
            files.preadv(file, memoryview(got)[at : at + MB // 4], start + at)
            time.sleep(pauses[number] if number < len(pauses) else 0.0)
        return bytes(got)

    for file in range(len(files.stats)):
        files.pread(file, 8, 0)
        files.pread(file, HEADER - 8, 8)
    files.expect(extents)
    with ThreadPoolExecutor(workers) as pool:
        return b"".join(pool.map(one, range(len(extents))))


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("git", [False, True])
def test_what_is_whole_is_hashed_with_nothing_fetched_twice(workers: int, git: bool) -> None:
    data, extents = world([300, 9 * MB, 40_000, 17 * MB, 8, 3 * MB, MB], files=2)
    store = Store(data)
    files = opened(store, workers, git=git)
    assert read(files, extents, workers) == b"".join(d[HEADER:] for d in data)
    files.check_unchanged()
    assert all(hashing is not None and hashing.fits for hashing in files._order.hashes)
    assert store.sent <= sum(map(len, data)) + 2 * HEAD  # the first looks
    assert files.extra == 0
    files.close()


def test_several_passes_are_hashed_once_and_compared_after_that() -> None:
    data, extents = world([9 * MB, 40_000, MB])
    store = Store(data)
    files = opened(store)
    for _ in range(3):
        assert read(files, extents, 2) == data[0][HEADER:]
    files.check_unchanged()
    assert files.extra == 0
    store.spoil = lambda _file, _start, into: into.__setitem__(0, into[0] ^ 1)
    files.expect(extents)
    with pytest.raises(Trouble, match="other bytes than before"):
        files.pread(0, 8, extents[0][1])
    files.close()


@pytest.mark.parametrize("where", [0, 500, HEADER, HEADER + 5 * MB, -1])
def test_one_bit_anywhere_is_found(where: int) -> None:
    data, extents = world([6 * MB, 40_000, MB])
    where %= len(data[0])
    for times, error, words in ((1, Trouble, "damaged on its way"), (99, Refuse, "read twice")):
        store, left = Store(data), [times]

        def spoil(_file: int, start: int, into: memoryview, left: list[int] = left) -> None:
            if len(into) == HEAD and where >= HEADER:
                return  # the first look, of which only the header is used
            if start <= where < start + len(into) and left[0]:
                left[0] -= 1
                into[where - start] ^= 1

        store.spoil = spoil
        files = opened(store)
        read(files, extents, 2)
        with pytest.raises(error, match=words) as raised:
            files.check_unchanged()
        assert not isinstance(raised.value, Refuse) or raised.value.reason == "changed"
        files.close()


def test_bytes_that_come_otherwise_each_time_settle_nothing() -> None:
    data, extents = world([6 * MB])
    store = Store(data)
    chance = random.Random(1)
    store.spoil = lambda _file, _start, into: into.__setitem__(0, chance.randrange(256))
    files = opened(store)
    read(files, extents, 1)
    with pytest.raises(Trouble):
        files.check_unchanged()
    files.close()


def test_what_nobody_reads_is_fetched_for_the_hash_and_counted() -> None:
    data, extents = world([MB, 2 * MB, MB], gaps=[30 * MB, 100, 20 * MB])
    store = Store(data)
    files = opened(store)
    read(files, extents, 2)
    files.check_unchanged()
    assert all(hashing is not None and hashing.fits for hashing in files._order.hashes)
    assert 50 * MB <= files.extra <= 50 * MB + 200
    assert store.sent <= len(data[0]) + HEAD
    where = HEADER + 20 * MB  # in what nobody reads
    store.files[0] = data[0][:where] + bytes([data[0][where] ^ 1]) + data[0][where + 1 :]
    again = opened(store, said=data)
    read(again, extents, 2)
    with pytest.raises(Refuse, match="hash"):
        again.check_unchanged()


def test_a_mirror_that_says_no_hash_is_read_as_before() -> None:
    data, extents = world([MB, 2 * MB], gaps=[30 * MB])
    store = Store(data)
    files = Ranges(store, "o/m", "1" * 40, [RemoteFile("0", len(data[0]), "", None)], 2)  # type: ignore[arg-type]
    read(files, extents, 2)
    files.check_unchanged()
    assert store.sent <= 3 * MB + HEAD
    files.close()


def test_a_reader_far_ahead_keeps_no_more_than_it_may_and_nothing_is_fetched_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One worker reads a large tensor slowly, the other large ones behind it."""
    monkeypatch.setattr(module, "HELD_LEAST", 8 * MB)
    monkeypatch.setattr(module, "HELD", 8 * MB)
    data, extents = world([24 * MB, 24 * MB, 24 * MB])
    store = Store(data)
    files = opened(store)
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, sum(files._held))

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert read(files, extents, 2, pauses=[0.01, 0.0, 0.0]) == data[0][HEADER:]
    done.set()
    watcher.join()
    files.check_unchanged()
    assert 0 < most <= 8 * MB + files._largest
    assert files.extra == 0
    assert store.sent <= len(data[0]) + HEAD
    files.close()


def test_a_reader_who_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where tensors are read in another order than that of the file."""
    monkeypatch.setattr(module, "HELD_LEAST", 8 * MB)
    monkeypatch.setattr(module, "HELD", 8 * MB)
    data, extents = world([4 * MB] * 12)
    files = opened(Store(data))
    begun = time.monotonic()
    files.pread(0, 8, 0)
    files.pread(0, HEADER - 8, 8)
    files.expect(extents)
    for file, start, size in reversed(extents):
        assert files.pread(file, size, start) == data[0][start : start + size]
    files.check_unchanged()
    assert time.monotonic() - begun < module.PATIENCE
    assert all(hashing is not None and hashing.fits for hashing in files._order.hashes)
    assert sum(files._held) == 0
    files.close()


def test_a_file_that_is_read_whole_at_once_is_compared_too() -> None:
    """An adapter's configuration: no tensors are announced."""
    store = Store([b"{}" * 50])
    files = opened(store)
    assert files.pread(0, 100, 0) == b"{}" * 50
    files.check_unchanged()
    files.close()
    files = opened(store, said=[b"[]" * 50])
    with pytest.raises(Refuse, match="hash"):
        files.pread(0, 100, 0)


def test_only_headers_read_nothing_more() -> None:
    data, _ = world([9 * MB])
    store = Store(data)
    files = opened(store)
    files.pread(0, 8, 0)
    files.pread(0, HEADER - 8, 8)
    files.check_unchanged()
    assert store.sent <= HEAD
    files.close()
