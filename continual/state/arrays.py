"""One tensor's accumulator in a Zarr v3 array: metadata by zarr-python, chunks written and read directly.

Zarr v3 core specification, regular chunk grid, codecs `bytes` (little endian) and `crc32c`, chunk keys with dots: a
chunk file is the raw values, then their CRC32C in four little-endian bytes. Chunks are equal blocks of rows of at most
32 MiB; where the rows do not divide evenly the last block is padded with zeros. `stem` is what the paths of a tensor's
chunk files begin with: `ARRAY/c`, or `ARRAY/c.7` of the tensor 7 in an array of several, whose first axis are the
tensors, one to a chunk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import google_crc32c

from continual.errors import Damaged, Misconfigured
from continual.lazily import numpy as np
from continual.records import SlotSpec
from continual.state import storing
from continual.state.storing import NewChunk, OldChunk, Stem
from continual.timing.clock import stage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zarr.core.buffer import Buffer

    Array = NDArray[Any]
else:
    Array = "numpy.ndarray"  # for annotations alone

CHUNK_BYTES = 32 << 20


class Grid(NamedTuple):
    """How an array is cut: `rows` of the first axis in each of `chunks` chunks."""

    rows: int
    chunks: int


@functools.cache
def grid(spec: SlotSpec) -> Grid:
    """Equal row blocks of at most 32 MiB, or of as many rows as the slot says; one chunk for a scalar, none for an
    empty array."""
    if not spec.shape:
        return Grid(1, 1)
    if spec.rows is not None:
        return Grid(spec.rows, math.ceil(spec.shape[0] / spec.rows) if spec.nbytes else 0)
    if spec.nbytes == 0:
        return Grid(max(1, spec.shape[0]), 0)
    length = spec.shape[0]
    most = max(1, CHUNK_BYTES // (spec.nbytes // length))
    count = math.ceil(length / most)
    # a number of blocks a little larger may divide the rows evenly, and needs no padding then
    count = next((n for n in range(count, min(2 * count, length) + 1) if length % n == 0), count)
    rows = math.ceil(length / count)
    return Grid(rows, math.ceil(length / rows))


@functools.cache
def _template(spec: SlotSpec, tensors: int | None) -> dict[str, object]:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    several = () if tensors is None else (tensors,)
    chunks = (grid(spec).rows, *(max(1, n) for n in spec.shape[1:])) if spec.shape else ()
    store: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(store),
        shape=(*several, *spec.shape),
        chunks=(*(1 for _ in several), *chunks),
        dtype=spec.dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=0,
        zarr_format=3,
    )
    return cast("dict[str, object]", json.loads(store["zarr.json"].to_bytes()))


def metadata(spec: SlotSpec, attributes: Mapping[str, object], tensors: int | None = None) -> bytes:
    """The zarr.json of an array with these attributes: of one tensor's, or of so many tensors' along a first axis."""
    return json.dumps(_template(spec, tensors) | {"attributes": attributes}, sort_keys=True).encode()


@functools.cache
def group_metadata() -> bytes:
    """The zarr.json of a group."""
    import zarr
    from zarr.storage import MemoryStore

    store: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(store), zarr_format=3)
    return store["zarr.json"].to_bytes()


@functools.cache
def suffixes(spec: SlotSpec) -> tuple[str, ...]:
    """What the paths of the chunk files have after the stem, in row order."""
    if not spec.shape:
        return ("",)
    rest = ".0" * (len(spec.shape) - 1)
    return tuple(f".{i}{rest}" for i in range(grid(spec).chunks))


class Writer:
    """Writes the values of a new array in order, in pieces of any size, as chunks: all of them, or those numbered
    `chunks`. Not synced."""

    def __init__(self, stem: Stem, spec: SlotSpec, chunks: range | None = None) -> None:
        after = suffixes(spec)
        after = after if chunks is None else after[chunks.start : chunks.stop]
        self._paths = [stem + suffix for suffix in after]
        self._size = chunk_bytes(spec)
        self._file: NewChunk | None = None
        self._at = self._crc = 0
        self._checksums: list[str] = []

    def write(self, data: memoryview) -> None:
        """The next values, as bytes."""
        while data:
            if self._file is None:
                self._file = storing.new_chunk(self._paths[len(self._checksums)], self._size + 4)
            part = data[: self._size - self._at]
            self._crc = _crc(self._crc, part)
            self._file.write(part)
            self._at += len(part)
            data = data[len(part) :]
            if self._at == self._size:
                self._file.write(self._crc.to_bytes(4, "little"))
                self._file.finish()
                self._checksums.append(f"{self._crc:08x}")
                self.close()

    def finish(self) -> list[str]:
        """Pads the last chunk and returns the CRCs of all (of values and padding)."""
        if self._file is not None:
            self.write(memoryview(bytes(self._size - self._at)))
        assert len(self._checksums) == len(self._paths), "fewer values than the array has"
        return self._checksums

    def close(self) -> None:
        """Closes the file it is at."""
        if self._file is not None:
            self._file.close()
        self._file, self._at, self._crc = None, 0, 0


class Reader:
    """Reads the values of an array in order, in pieces of any size, from its chunk `skip` on; a chunk is checked as its
    last value is read. An array that ends early is read to its end and no further.

    Raises Damaged naming the chunk that is missing, has another size, or whose CRC is not the one its receipt has;
    Misconfigured if the generation has been deleted meanwhile.
    """

    def __init__(self, stem: Stem, spec: SlotSpec, checksums: Sequence[str], skip: int = 0) -> None:
        self._paths = [stem + suffix for suffix in suffixes(spec)]
        if len(checksums) != len(self._paths) and (spec.rows is None or len(checksums) > len(self._paths)):
            raise Damaged(f"{stem}: the receipt has {len(checksums)} chunks, the format {len(self._paths)}")
        self._checksums = checksums
        self._size = chunk_bytes(spec)
        self._left = spec.nbytes - skip * self._size
        self._next = skip
        self._file: OldChunk | None = None
        self._at = self._crc = 0

    def read(self, into: memoryview) -> None:
        """Fills `into` with the next values, as bytes."""
        while into:
            path = self._paths[self._next]
            file = self._file or self._open(path)
            part = into[: min(self._size, self._at + self._left) - self._at]
            with stage("read", len(part)):
                count = file.read_into(part, self._at)
            if count == 0:
                raise Damaged(f"chunk {path} is damaged: it ends after {self._at} bytes")
            self._crc = _crc(self._crc, into[:count])
            self._at += count
            self._left -= count
            into = into[count:]
            if self._at == self._size or self._left == 0:
                self._check(path)

    def close(self) -> None:
        """Closes the file it is at."""
        if self._file is not None:
            self._file.close()
        self._file, self._at, self._crc = None, 0, 0

    def _open(self, path: Stem) -> OldChunk:
        try:
            self._file = file = storing.old_chunk(path)
        except FileNotFoundError:
            raise gone(path) from None
        if file.nbytes != self._size + 4:
            raise Damaged(f"chunk {path} is damaged: {file.nbytes} bytes where {self._size + 4} were written")
        return file

    def _check(self, path: Stem) -> None:
        """Takes padding and checksum, and the next chunk in turn."""
        assert self._file is not None
        rest = self._file.read(self._size - self._at + 4, self._at)
        found = _crc(self._crc, rest[:-4])
        if not f"{int.from_bytes(rest[-4:], 'little'):08x}" == f"{found:08x}" == self._checksums[self._next]:
            raise Damaged(
                f"chunk {path} is damaged: its contents are not those its receipt is for; "
                "restore it, or roll back to an earlier record"
            )
        self.close()
        self._next += 1


def write(stem: Stem, spec: SlotSpec, array: Array) -> list[str]:
    """Writes the chunks of `array`; returns their CRCs. Not synced."""
    assert array.shape == spec.shape, (array.shape, spec)
    assert array.dtype == spec.dtype, (array.dtype, spec)
    with contextlib.closing(Writer(stem, spec)) as writer:
        writer.write(raw(np.ascontiguousarray(array)))
        return writer.finish()


def nothing(spec: SlotSpec, into: Array | None = None) -> Array:
    """The array where nothing was written: zeros; in `into` where that is given."""
    if into is None:
        return np.zeros(spec.shape, spec.dtype)
    into.fill(0)
    return into


def write_zeros(stem: Stem, spec: SlotSpec) -> list[str]:
    """Writes the chunks of an array of zeros, as `write` would; returns their CRCs. Not synced.

    The values are a hole in the file, which the file system reads as zeros and keeps no block for.
    """
    size, after = chunk_bytes(spec), suffixes(spec)
    checksum = _crc_of_zeros(size)
    for suffix in after:
        with contextlib.closing(storing.new_chunk(stem + suffix, size + 4)) as file:
            file.skip(size)
            file.write(checksum.to_bytes(4, "little"))
            file.finish()
    return [f"{checksum:08x}"] * len(after)


def zeros(spec: SlotSpec) -> list[str]:
    """The CRCs of the chunks of an array of zeros."""
    return [f"{_crc_of_zeros(chunk_bytes(spec)):08x}"] * grid(spec).chunks


@functools.cache
def _crc_of_zeros(size: int) -> int:
    """The CRC of `size` bytes that are all zero."""
    block, checksum = bytes(min(size, 1 << 20)), 0
    for start in range(0, size, 1 << 20):
        checksum = _crc(checksum, block[: size - start])
    return checksum


def read(stem: Stem, spec: SlotSpec, checksums: Sequence[str], into: Array | None = None) -> Array:
    """The array, in `into` where that is given: of its shape and dtype. Raises as `Reader` does."""
    if spec.rows:
        return read_rows(stem, spec, checksums, 0, spec.shape[0])
    array: Array = np.empty(spec.shape, spec.dtype) if into is None else into
    assert array.shape == spec.shape, (array.shape, spec)
    assert array.dtype == spec.dtype, (array.dtype, spec)
    with contextlib.closing(Reader(stem, spec, checksums)) as reader:
        reader.read(raw(array))
    return array


def read_rows(stem: Stem, spec: SlotSpec, checksums: Sequence[str], start: int, stop: int) -> Array:
    """The rows from `start` on, to but without `stop`, of an array with `rows`; those behind its last chunk are zeros.
    Only the chunks with these rows are read, each of them whole. Raises as `Reader` does."""
    assert spec.rows
    first, there = start // spec.rows, min(len(checksums) * spec.rows, spec.shape[0])
    last = min(math.ceil(stop / spec.rows) * spec.rows, there)
    found: Array = np.zeros((max(stop, last) - first * spec.rows, *spec.shape[1:]), spec.dtype)
    if first * spec.rows < last:
        with contextlib.closing(Reader(stem, spec, checksums, first)) as reader:
            reader.read(raw(found[: last - first * spec.rows]))
    return found[start - first * spec.rows : stop - first * spec.rows]


def raw(array: Array) -> memoryview:
    """The bytes of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _crc(before: int, data: bytes | memoryview) -> int:
    """The CRC32C of what had the CRC `before`, then `data`."""
    if not len(data):  # it takes no memoryview
        return before
    with stage("checksum", len(data)):
        return int(google_crc32c.extend(before, np.frombuffer(data, np.uint8)))


def chunk_bytes(spec: SlotSpec) -> int:
    """Bytes of the values in one chunk, padding included."""
    return grid(spec).rows * (spec.nbytes // max(1, spec.shape[0])) if spec.shape else spec.nbytes


def gone(path: Stem) -> Damaged | Misconfigured:
    """Why a chunk, or a zarr.json, of a generation is not there."""
    generation = next(p for p in storing.place(path).parents if p.parent.name == "generations")
    if not generation.exists():
        return Misconfigured(f"{generation} has expired: only the last few generations and tagged ones are kept")
    what = path if str(path).endswith("/zarr.json") else f"chunk {path}"
    return Damaged(f"{what} is missing; restore it, or roll back to an earlier record")
