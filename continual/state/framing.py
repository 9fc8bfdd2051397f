"""JSON files that know their own checksum: a line with the CRC32C of the rest in hexadecimal, then the body's exact
bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import cast

import google_crc32c

from continual.errors import Damaged, Refuse
from continual.state import storing
from continual.state.durable import environment
from continual.stores import Where

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class _NoNumber(Exception):
    """A word that JSON's grammar has not and Python's reads: NaN or an infinity."""


def _refuse(word: str) -> float:
    raise _NoNumber(word)


_DECODER = json.JSONDecoder(parse_constant=_refuse)
"""One for all files: a state has a file for each record, and opening it reads all of them."""


def crc(data: bytes) -> str:
    """CRC32C (Castagnoli) of bytes as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def encode(body: Mapping[str, object]) -> tuple[bytes, str]:
    """The file's bytes for `body`, and the CRC in its first line. Keys are sorted, so equal bodies are equal bytes; NaN
    is refused.

    Half of a surrogate pair, which stands for a byte of a file's name that is no UTF-8, is written as its escape.
    Raises Refuse for the two halves of a pair one after the other: read back they would be one character.
    """
    line = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
    if found := _PAIR.search(line):
        around = line[max(0, found.start() - 30) : found.end() + 30]
        raise Refuse("name", f"{around!r}: this text has two halves of a surrogate pair, and no record can hold it")
    text = line.encode("utf-8", "backslashreplace")  # of JSON only such halves are replaced, and by JSON's own escape
    checksum = crc(text)
    return checksum.encode() + b"\n" + text, checksum


def decode(path: Where | str) -> tuple[dict[str, object], str]:
    """The body of the file at `path` and its CRC. Raises Damaged naming the file if it is missing, altered or no such
    file; Retry if it cannot be read now."""
    with environment(f"cannot read {path}"):
        try:
            data = storing.contents(path)
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(
                f"{path} is missing; restore it from a backup, continual does not guess what it held"
            ) from None
        except IsADirectoryError:
            raise Damaged(f"{path} is a directory, where a file was written; restore it from a backup") from None
    line, newline, text = data.partition(b"\n")
    if not newline or line != crc(text).encode():
        told = line[:8].decode("ascii", "backslashreplace")
        raise Damaged(
            f"{path} is damaged: its contents do not have the checksum {told!r} in its first line; "
            "restore it from a backup"
        )

    try:
        body = _DECODER.decode(text.decode("utf-8", "surrogatepass"))
    except _NoNumber as found:
        raise Damaged(f"{path} is damaged: {found} is no number; restore it from a backup") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no JSON ({error}), though its checksum is right; restore it from a backup") from None
    if not isinstance(body, dict):
        raise Damaged(f"{path} is no JSON object")
    return cast("dict[str, object]", body), line.decode()


def said(data: bytes) -> dict[str, object]:
    """The body of a file that only informs; nothing where it is half written, or no such file."""
    try:
        body = json.loads(data.partition(b"\n")[2])
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", body) if isinstance(body, dict) else {}
