"""One tensor's accumulator as a Zarr v3 array: metadata by zarr-python, chunks written and read directly.

Zarr v3 core specification, regular chunk grid, codecs `bytes` (little endian) and `crc32c`: a chunk file is the raw values, then their CRC32C in four
little-endian bytes. Chunks are equal blocks of rows of at most 32 MiB; where the rows do not divide evenly the last block is padded with zeros.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from continual.errors import Damaged, Misconfigured
from continual.records import SlotSpec
from continual.state.durable import write_bytes
from continual.state.framing import crc

CHUNK_BYTES = 32 << 20
Array = NDArray[Any]


class Grid(NamedTuple):
    """How an array is cut: `rows` of the first axis per chunk, `count` chunks."""

    rows: int
    chunks: int


@functools.cache
def grid(spec: SlotSpec) -> Grid:
    """Equal row blocks of at most 32 MiB; one chunk for a scalar, none for an empty array."""
    if not spec.shape:
        return Grid(1, 1)
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
def _template(spec: SlotSpec) -> dict[str, Any]:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    chunks = (grid(spec).rows, *(max(1, n) for n in spec.shape[1:])) if spec.shape else ()
    store: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(store),
        shape=spec.shape,
        chunks=chunks,
        dtype=spec.dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        zarr_format=3,
    )
    body: dict[str, Any] = json.loads(store["zarr.json"].to_bytes())
    return body


def metadata(spec: SlotSpec, name: str) -> bytes:
    """The zarr.json of an array; its attribute `name` is the tensor's true name."""
    return json.dumps(_template(spec) | {"attributes": {"name": name}}, sort_keys=True).encode()


@functools.cache
def group_metadata() -> bytes:
    """The zarr.json of a group."""
    import zarr
    from zarr.storage import MemoryStore

    store: dict[str, Any] = {}
    zarr.create_group(MemoryStore(store), zarr_format=3)
    data: bytes = store["zarr.json"].to_bytes()
    return data


def chunk_names(spec: SlotSpec) -> list[str]:
    """Paths of the chunk files below the array's directory, in row order."""
    if not spec.shape:
        return ["c"]
    rest = "/0" * (len(spec.shape) - 1)
    return [f"c/{i}{rest}" for i in range(grid(spec).chunks)]


def write(directory: Path, spec: SlotSpec, array: Array) -> list[str]:
    """Writes the chunks of `array` below `directory`; returns their CRCs (of values and padding). Not synced."""
    assert array.shape == spec.shape, (array.shape, spec)
    assert array.dtype == spec.dtype, (array.dtype, spec)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    checksums = []
    cut = grid(spec)
    for i, name in enumerate(chunk_names(spec)):
        block = array[i * cut.rows : (i + 1) * cut.rows] if spec.shape else array.reshape(1)
        if spec.shape and block.shape[0] < cut.rows:
            block = np.concatenate([block, np.zeros((cut.rows - block.shape[0], *spec.shape[1:]), block.dtype)])
        value = google_crc32c.value(block)
        path = directory / name
        if i == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif spec.shape and len(spec.shape) > 1:
            path.parent.mkdir()
        write_bytes(path, block.reshape(-1).view(np.uint8).data, value.to_bytes(4, "little"))
        checksums.append(f"{value:08x}")
    return checksums


def read(directory: Path, spec: SlotSpec, checksums: list[str], out: Array | None = None) -> Array:
    """The array below `directory`, into `out` if given (C-contiguous, same shape and dtype).

    Raises Damaged naming the chunk that is missing, has another size, or whose CRC is not the one its receipt has; Misconfigured if the generation
    has been deleted meanwhile.
    """
    array: Array = np.empty(spec.shape, spec.dtype) if out is None else out
    cut = grid(spec)
    if len(checksums) != cut.chunks:
        raise Damaged(f"{directory}: the receipt has {len(checksums)} chunks, the format {cut.chunks}")
    flat = array.reshape(-1).view(np.uint8)
    chunk_bytes = spec.nbytes if not spec.shape else cut.rows * (spec.nbytes // max(1, spec.shape[0]))
    for i, (name, checksum) in enumerate(zip(chunk_names(spec), checksums, strict=True)):
        part = flat[i * chunk_bytes : (i + 1) * chunk_bytes]
        padded = np.empty(chunk_bytes, np.uint8) if part.size < chunk_bytes else part
        _read_chunk(directory / name, padded, checksum)
        if padded is not part:
            part[:] = padded[: part.size]
    return array


def _read_chunk(path: Path, into: Array, checksum: str) -> None:
    tail = bytearray(4)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _gone(path) from None
    try:
        size = os.fstat(fd).st_size
        if size != into.nbytes + 4:
            raise Damaged(f"chunk {path} is damaged: {size} bytes where {into.nbytes + 4} were written")
        view, done = into.data, 0
        while done < into.nbytes:
            count = os.preadv(fd, [view[done:]], done)
            if count == 0:
                raise Damaged(f"chunk {path} is damaged: it ends after {done} bytes")
            done += count
        os.preadv(fd, [tail], into.nbytes)
    finally:
        os.close(fd)
    if not f"{int.from_bytes(tail, 'little'):08x}" == crc(into) == checksum:
        raise Damaged(
            f"chunk {path} is damaged: its contents are not those its receipt is for; restore it, or roll back to an earlier record"
        )


def _gone(path: Path) -> Damaged | Misconfigured:
    generation = next(p for p in path.parents if p.parent.name == "generations")
    if not generation.exists():
        return Misconfigured(f"{generation} has expired: only the last few generations and tagged ones are kept")
    return Damaged(f"chunk {path} is missing; restore it, or roll back to an earlier record")
