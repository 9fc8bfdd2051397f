"""Bytes that others wrote: JSON within limits, and files that are opened only if they are files. Whoever publishes a
model decides what its files hold and what kind of files they are, so both are asked before they are believed.

What the bytes mean, and what becomes of whoever sent them, is for the rooms that read them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

VALUES = 100_000
"""Values of the largest JSON text that is parsed. A value takes some 100 to 200 bytes of memory while it is."""
DEPTH = 64
"""How deep lists and objects may lie in each other."""
_LONGEST_NUMBER = 400
_SHOWN = 80
_LISTED = 8
_LEVELS = 3
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class Malformed(ValueError):
    """A text that is no JSON as it is read here. The message says why, in a few words and on one line."""


class Irregular(OSError):
    """A path that leads to something else than a regular file: a directory, FIFO, socket or device."""


def parse_json(data: bytes, *, values: int = VALUES, depth: int = DEPTH, infinite: bool = False) -> object:
    """What a JSON text says. Limits are asked of the bytes, before anything is made of them.

    Raises Malformed for everything else: more than `values` values, lists and objects more than `depth` deep, a key
    twice, NaN, numbers that no float holds or of thousands of digits, what is no UTF-8, half a surrogate pair.
    `infinite`: the words Infinity and -Infinity, which are no JSON, are read as Python writes them.
    """
    parts = data.count(b",") + data.count(b"[") + data.count(b"{")
    if parts > values:
        raise Malformed(f"more than {values} values")
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    if b"\\u" in bare and _HALF.search(_PAIR.sub(b" ", bare)):
        raise Malformed("half a surrogate pair, which is no character")
    _check_depth(bare, parts, depth)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_infinity if infinite else _constant,
            parse_float=_finite,
        )
    except Malformed:
        raise
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise Malformed(f"more than {depth} levels deep") from None
    except ValueError as error:
        said = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else None
        raise Malformed(said or "a number of thousands of digits") from None


def parse_fields(data: bytes, *, values: int = VALUES, depth: int = DEPTH, infinite: bool = False) -> dict[str, object]:
    """The fields of a JSON object. Raises Malformed as `parse_json`, and for any other JSON."""
    body = parse_json(data, values=values, depth=depth, infinite=infinite)
    if not isinstance(body, dict):
        raise Malformed("no JSON object")
    return body


def shown(value: object) -> str:
    """A value that others wrote, as it may stand in a message: one line, and short."""
    if isinstance(value, str):
        text = value[: _SHOWN + 1]
        text = text if text.isprintable() else ascii(text)
    else:
        text = _brief(value, _LEVELS)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def few(names: Iterable[str], count: int | None = None, most: int = 5) -> str:
    """The first of some names, for a line, and how many more there are; empty where there are none. `count`: how many
    there are, where not all of them are given."""
    listed = list(names)
    more = (len(listed) if count is None else count) - len(listed[:most])
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


def few_shares(shares: Mapping[str, float]) -> str:
    """The largest shares of something, for a line: `lora-1 3.20%`; empty where there are none."""
    return few(f"{name} {share:.2%}" for name, share in sorted(shares.items(), key=lambda one: -one[1]))


def counted(count: int, noun: str) -> str:
    """A number of things, for a line: `1 model`, `2 models`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def open_regular(path: str | Path) -> int:
    """A descriptor to read a regular file, wherever links lead; who calls closes it.

    Nothing else is opened: not for a moment, since to open a device can do something. Raises Irregular, OSError.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise Irregular(f"{path}: is no regular file")
        # the file itself, whatever the path leads to by now
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    finally:
        os.close(found)


def read_regular(path: str | Path, most: int) -> bytes:
    """The contents of a regular file of at most `most` bytes. Raises Malformed if it is larger, Irregular, OSError."""
    fd = open_regular(path)
    with open(fd, "rb") as opened:
        if os.fstat(fd).st_size > most:
            raise Malformed(f"more than {most} bytes")
        return opened.read(most)


def _check_depth(bare: bytes, parts: int, depth: int) -> None:
    """Raises Malformed where brackets lie deeper than `depth`. `bare` has no escaped quotes or backslashes any more.

    Only brackets outside of strings are kept; each round takes the innermost pairs away.
    """
    kept = bare.translate(_BRACKETS, _OTHERS)
    if kept.count(b'"') > 4 * parts + 2:
        raise Malformed("more strings than a JSON text of this form can have")
    kept = b"".join(kept.split(b'"')[::2])
    for _ in range(depth):
        before = len(kept)
        kept = kept.replace(b"[]", b"")
        if len(kept) in (0, before):
            break
    if len(kept) > depth or b"[]" in kept:
        raise Malformed(f"more than {depth} levels deep, or brackets that do not match")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise Malformed(f"{shown(twice)} is there twice")
    return found


def _constant(word: str) -> float:
    raise Malformed(f"{word}, which is no JSON")


def _infinity(word: str) -> float:
    return _constant(word) if word == "NaN" else float(word)


def _finite(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    if math.isinf(value):
        raise Malformed(f"the number {shown(text)}, which is too large or too long")
    return value


def _brief(value: object, levels: int) -> str:
    """The beginning of a value; how much is looked at has a limit, whatever its size."""
    if isinstance(value, str):
        return ascii(value[: _SHOWN + 1])
    if isinstance(value, dict | list | tuple):
        if not levels:
            return "…"
        if isinstance(value, dict):
            first = itertools.islice(value.items(), _LISTED)
            parts = [f"{_brief(key, levels - 1)}: {_brief(item, levels - 1)}" for key, item in first]
        else:
            parts = [_brief(item, levels - 1) for item in itertools.islice(value, _LISTED)]
        text = ", ".join(parts if len(value) <= _LISTED else [*parts, "…"])
        return f"{{{text}}}" if isinstance(value, dict) else f"[{text}]"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"a number of {value.bit_length()} bits"
    return ascii(value)
