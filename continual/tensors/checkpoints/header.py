"""The head of a safetensors file, parsed strictly: whatever is not exactly as the format says is refused by name.

Format: https://huggingface.co/docs/safetensors. Eight little-endian bytes with the length N of the header, N bytes of
JSON (tensor name to dtype, shape and data_offsets, and `__metadata__` of strings), then the data, which the offsets
cover without gap or overlap. Stricter than the format in two points: names are printable (they go into paths, logs and
records), and a header is at most 32 MB, where the safetensors library reads 100 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import VALUES, Malformed, parse_fields, shown
from continual.records import ITEMSIZE
from continual.tensors.checkpoints import foreign

LONGEST = 32_000_000
"""Bytes of the longest header that is read. A parsed header takes eight times its size in memory; real ones have a few
MB, and those of a model of a thousand shards are read one after the other."""
MOST = 500_000
"""Tensors of the largest model that is opened, over all of its files."""
IN_ONE = 250_000
"""Tensors of the largest file. This is asked of the bytes, before anything is made of them."""
_VALUES = 2_500_000
"""Values of the largest header: some ten for each tensor."""
_PARTS = 16
"""Commas and colons of a tensor's entry, with some to spare for the shape."""
_LONGEST_NAME = 1000
_NARROW = ("F8_", "F6_", "F4")
"""How the dtypes of the format begin in which only quantised models are stored."""
_BITS = {dtype: 8 * size for dtype, size in ITEMSIZE.items()}
_NARROW_BITS = {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class TensorInfo(NamedTuple):
    """One tensor of a file: `file` is the index of its file in the checkpoint, `offset` its first byte from the
    beginning of that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


def parse(
    pread: Callable[[int, int], bytes], size: int, where: str, file: int = 0, *, narrow: bool = False
) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes by name.

    `pread(length, offset)` reads from the file; `where` names it in messages; `narrow` lets the dtypes pass in which
    only quantised models are stored. Raises Refuse with the reasons
    `truncated` (the file is shorter than its header says), `header` (malformed), `dtype` or `quantised`; and as
    `foreign.check_bytes` for what is another kind of file.
    """
    try:
        return _parsed(pread, size, where, file, narrow)
    except Refuse:
        foreign.check_bytes(pread(min(size, foreign.HEAD), 0), where)
        raise


def _parsed(
    pread: Callable[[int, int], bytes], size: int, where: str, file: int, narrow: bool
) -> dict[str, TensorInfo]:
    if size < 8:
        raise Refuse("truncated", f"{where}: {size} bytes are no safetensors file")
    length = _length(pread, where)
    if 8 + length > size:
        raise Refuse("truncated", f"{where}: the header claims {length} bytes and the file has {size}: it is cut off")
    body = _body(pread(length, 8), where)
    _metadata(body.pop("__metadata__", {}), where)
    bits = {**_BITS, **_NARROW_BITS} if narrow else _BITS
    infos = {name: _tensor(name, entry, where, file, 8 + length, bits) for name, entry in body.items()}
    _covered(sorted(infos.values(), key=lambda t: (t.offset, t.nbytes)), 8 + length, size, where)
    return infos


def metadata(pread: Callable[[int, int], bytes], where: str) -> dict[str, str]:
    """The `__metadata__` of a file that `parse` took: a few strings its publisher wrote there. Raises Refuse (`header`)
    if the file was exchanged since, and is none any more."""
    body = _body(pread(_length(pread, where), 8), where).get("__metadata__", {})
    _metadata(body, where)
    return body if isinstance(body, dict) else {}


def json_object(
    text: bytes, where: str, reason: str, *, values: int = VALUES, infinite: bool = False
) -> dict[str, object]:
    """Bytes that others wrote as a JSON object. Raises Refuse(reason) for anything that `continual.outside` does not
    read, Refuse (`foreign`) for a pointer or a page in place of the file."""
    try:
        return parse_fields(text, values=values, infinite=infinite)
    except Malformed as error:
        foreign.check_text(text[: foreign.HEAD], where)
        raise Refuse(reason, f"{where}: no valid JSON ({error})") from None


def _length(pread: Callable[[int, int], bytes], where: str) -> int:
    length = int.from_bytes(pread(8, 0), "little")
    if length > LONGEST:
        raise Refuse(
            "header",
            f"{where}: the header claims {length} bytes; at most {LONGEST} are read: "
            "this is no safetensors file, or a damaged one",
        )
    return length


def _body(text: bytes, where: str) -> dict[str, object]:
    """The JSON of a header. Raises Refuse (`header`), also for one with far more in it than tensors have: while a long
    list without an object in it is parsed, no other thread runs."""
    if text.count(b"{") > IN_ONE + 2:  # around all of it, and around __metadata__
        raise Refuse("header", f"{where}: more than {IN_ONE} tensors in one file; write the model in shards")
    if text.count(b",") + text.count(b":") > _PARTS * text.count(b"{") + VALUES:
        raise Refuse("header", f"{where}: the header holds more values than its tensors can have")
    return json_object(text, where, "header", values=_VALUES)


def _metadata(body: object, where: str) -> None:
    if not isinstance(body, dict) or any(not isinstance(value, str) for value in body.values()):
        raise Refuse("header", f"{where}: __metadata__ must map strings to strings")


def _tensor(name: str, entry: object, where: str, file: int, start: int, bits: Mapping[str, int]) -> TensorInfo:
    if not name or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise Refuse(
            "header", f"{where}: tensor name {shown(name)} is empty, not printable or longer than {_LONGEST_NAME}"
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refuse(
            "header", f"{where}: tensor {name}: the entry must have dtype, shape and data_offsets and nothing else"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype.startswith(_NARROW) and dtype not in bits:
        raise Refuse(
            "quantised",
            f"{where}: tensor {name} is {shown(dtype)} ({'FP8' if dtype.startswith('F8') else 'FP4 or FP6'}), which is "
            "too narrow to be merged; use the model that it was quantised from, in F32, F16 or BF16",
        )
    if not isinstance(dtype, str) or dtype not in bits:
        raise Refuse(
            "dtype",
            f"{where}: tensor {name} has dtype {shown(dtype)}, which cannot be folded or carried; "
            "convert it to F32, F16 or BF16",
        )
    if not _sizes(shape) or math.prod(n for n in shape if n) >= 1 << 62:
        raise Refuse("header", f"{where}: tensor {name}: shape {shown(shape)} is no list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refuse("header", f"{where}: tensor {name}: data_offsets {shown(offsets)} are no range")
    nbytes = -(-math.prod(shape) * bits[dtype] // 8)
    if offsets[1] - offsets[0] != nbytes:
        raise Refuse(
            "header",
            f"{where}: tensor {name}: {offsets[1] - offsets[0]} bytes for {dtype} {shown(shape)}, which takes {nbytes}",
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _sizes(value: object) -> bool:
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
