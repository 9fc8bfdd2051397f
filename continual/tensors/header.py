"""The head of a safetensors file, parsed strictly: whatever is not exactly as the format says is refused by name.

Format: https://huggingface.co/docs/safetensors. Eight little-endian bytes with the length N of the header, N bytes of JSON (tensor name to dtype, shape
and data_offsets, and `__metadata__` of strings), then the data, which the offsets cover without gap or overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from continual.errors import Refuse
from continual.records import ITEMSIZE

LONGEST = 100_000_000
"""Bytes of the longest header that is read, as in the reference implementation."""


class TensorInfo(NamedTuple):
    """One tensor of a file: `file` is the index of its file in the checkpoint, `offset` its first byte from the beginning of that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


def parse(pread: Callable[[int, int], bytes], size: int, where: str, file: int = 0) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes by name.

    `pread(length, offset)` reads from the file; `where` names it in messages. Raises Refuse with the reasons `truncated` (the file is shorter than its
    header says), `header` (malformed) or `dtype`.
    """
    if size < 8:
        raise Refuse("truncated", f"{where}: {size} bytes are no safetensors file")
    length = int.from_bytes(pread(8, 0), "little")
    if length > LONGEST:
        raise Refuse("header", f"{where}: the header claims {length} bytes; at most {LONGEST} are read: this is no safetensors file, or a damaged one")
    if 8 + length > size:
        raise Refuse("truncated", f"{where}: the header claims {length} bytes and the file has {size}: it is cut off")
    text = pread(length, 8)
    body = _json(text, where)
    _metadata(body.pop("__metadata__", {}), where)
    infos = {name: _tensor(name, entry, where, file, 8 + length) for name, entry in body.items()}
    _covered(sorted(infos.values(), key=lambda t: (t.offset, t.nbytes)), 8 + length, size, where)
    return infos


def _json(text: bytes, where: str) -> dict[str, Any]:
    """The header as a dictionary; duplicate names, nesting too deep for the parser and anything that is no object are refused."""
    if text[:1] != b"{":
        raise Refuse("header", f"{where}: the header does not begin with '{{'")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise Refuse("header", f"{where}: the header has {twice!r} twice")
        return found

    try:
        body = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=lambda word: _bad(where, word))
    except (ValueError, RecursionError) as error:
        raise Refuse("header", f"{where}: the header is no valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise Refuse("header", f"{where}: the header is no JSON object")
    return body


def _bad(where: str, word: str) -> None:
    raise Refuse("header", f"{where}: the header holds {word}")


def _metadata(body: Any, where: str) -> None:
    if not isinstance(body, dict) or any(not isinstance(value, str) for value in body.values()):
        raise Refuse("header", f"{where}: __metadata__ must map strings to strings")


def _tensor(name: str, entry: Any, where: str, file: int, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refuse("header", f"{where}: tensor {name}: the entry must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise Refuse("dtype", f"{where}: tensor {name} has dtype {dtype}, which cannot be folded or carried; convert it to F32, F16 or BF16")
    if not _sizes(shape):
        raise Refuse("header", f"{where}: tensor {name}: shape {shape!r} is no list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refuse("header", f"{where}: tensor {name}: data_offsets {offsets!r} are no range")
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise Refuse("header", f"{where}: tensor {name}: {offsets[1] - offsets[0]} bytes for {dtype} {shape}, which takes {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _covered(infos: list[TensorInfo], start: int, size: int, where: str) -> None:
    at = start
    for info in infos:
        if info.offset < at:
            raise Refuse("header", f"{where}: tensor {info.name} overlaps the one before it")
        if info.offset > at:
            raise Refuse("header", f"{where}: {info.offset - at} bytes before tensor {info.name} belong to none")
        at += info.nbytes
    if at > size:
        raise Refuse("truncated", f"{where}: {size} bytes where the header says {at}: it is cut off")
    if at < size:
        raise Refuse("header", f"{where}: {size - at} bytes after the last tensor belong to none")
