"""Parts of a file that several read: whoever reads a tensor makes the same marks; a bit that one of them got otherwise
is found, and what nobody hashed is told."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from continual.errors import Refuse, Retry
from continual.hub import RemoteFile, Trouble, marks, window
from continual.hub.elsewhere import without_login
from continual.hub.marks import FilesRead, MarksCompared, PartReader, read_through
from tests.unit.hub.test_hashing import MB, Store

SIZES = [300, 9 * MB, 40_000, 17 * MB, 8, 3 * MB, MB, 0, 4 * MB, 12]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "SMALLEST", 4 * MB)
    monkeypatch.setattr(window, "LARGEST", 4 * MB)
    monkeypatch.setattr(window, "HEAD", 256)
    monkeypatch.setattr(window, "LEAST", 256)


class Shelf:
    """A file of a header and tensors, as the Hub has it."""

    def __init__(self, gap: int = 100) -> None:
        chance = random.Random(1)
        header = json.dumps({"x" * 500: "y"}).encode()
        data = len(header).to_bytes(8, "little") + header
        self.extents: list[tuple[int, int]] = []
        for size in SIZES:
            self.extents.append((len(data), size))
            data += chance.randbytes(size + gap)
        self.file = RemoteFile("0", len(data), "", hashlib.sha256(data).hexdigest())
        self.store = Store([data])

    def part(self, extents: list[tuple[int, int]], *, whole: bool = False) -> FilesRead:
        """What one reads who is to read these."""
        names = ["0"] if whole else []
        reader = PartReader(self.store, "o/m", "1" * 40, [self.file], {}, names)  # type: ignore[arg-type]
        try:
            reader.expect([(0, *extent) for extent in extents])
            for start, nbytes in extents:
                for at in range(start, start + nbytes, MB):
                    count = min(MB, start + nbytes - at)
                    assert reader.pread(0, count, at) == self.store.files[0][at : at + count]
            return reader.take()
        finally:
            reader.close()

    def through(self) -> FilesRead:
        return read_through(self.store, "o/m", "1" * 40, self.file, self.extents)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_marks_do_not_depend_on_who_reads_what(seed: int) -> None:
    shelf, chance = Shelf(gap=0 if seed % 2 else 100), random.Random(seed)
    compared, whose = MarksCompared("o/m"), [chance.randrange(3) for _ in SIZES]
    parts = [[e for e, who in zip(shelf.extents, whose, strict=True) if who == one] for one in range(3)]
    for part in parts:
        compared.add(shelf.part(part))
    with pytest.raises(Retry, match="o/m/0: was read, and not compared with what the Hub says"):
        compared.check([shelf.file])
    proved = shelf.through()
    compared.add(proved)
    compared.check([shelf.file])
    assert proved.proved == {"0"}
    again = MarksCompared("o/m")
    again.add(shelf.part(shelf.extents, whole=True))
    again.check([shelf.file])


def test_who_reads_a_file_whole_downloads_it_once() -> None:
    shelf = Shelf()
    shelf.part(shelf.extents, whole=True)
    assert shelf.store.sent <= shelf.file.size + 600  # the header
    shelf.store.sent = 0
    shelf.through()
    assert shelf.store.sent <= shelf.file.size + 600


def test_a_bit_that_one_of_them_got_otherwise_is_found() -> None:
    shelf = Shelf()
    proved = shelf.through()
    for start, nbytes in shelf.extents:
        for where in {start, start + nbytes // 2, start + nbytes - 1} if nbytes else ():

            def spoil(_file: int, first: int, into: memoryview, where: int = where) -> None:
                if first <= where < first + len(into):
                    into[where - first] ^= 1

            compared = MarksCompared("o/m")
            compared.add(proved)
            reader = PartReader(shelf.store, "o/m", "1" * 40, [shelf.file], {})  # type: ignore[arg-type]
            reader.expect([(0, start, nbytes)])
            shelf.store.spoil = spoil
            reader.pread(0, nbytes, start)
            shelf.store.spoil = None
            with pytest.raises(Trouble, match="came with other bytes than before"):
                compared.add(reader.take())
            reader.close()


def test_who_reads_it_for_its_hash_says_who_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    left = [1]

    def once(_file: int, first: int, into: memoryview) -> None:
        if first > 1000 and left[0]:
            left[0] -= 1
            into[0] ^= 1

    shelf.store.spoil = once
    with pytest.raises(Trouble, match="damaged on its way"):
        shelf.through()
    monkeypatch.setattr(marks, "LONGEST", 4096)
    for byte, value in ((5, 1), (2, 16)):  # a length beyond the file, and one within it that no header has
        shelf.store.spoil = lambda _file, first, into, byte=byte, value=value: (
            into.__setitem__(byte, value) if first == 0 else None
        )
        shelf.store.sent = 0
        with pytest.raises(Trouble, match="came with other bytes"):
            shelf.through()
        assert shelf.store.sent < MB
    shelf.store.spoil = None
    data = bytearray(shelf.store.files[0])
    data[-1] ^= 1
    shelf.store.files[0] = bytes(data)
    with pytest.raises(Refuse, match="read twice"):
        shelf.through()


def test_an_address_goes_without_its_login() -> None:
    assert without_login("https://me:secret@mirror.example:8443/hub") == "https://mirror.example:8443/hub"
    assert without_login("https://[::1]:80") == "https://[::1]:80"
    assert without_login("") == ""
