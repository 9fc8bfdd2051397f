"""JSON files that know their own checksum: a line with the CRC32C of the rest in hexadecimal, then the body's exact
bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import google_crc32c

from continual.errors import Damaged


def crc(data: bytes) -> str:
    """CRC32C (Castagnoli) of bytes as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def encode(body: Mapping[str, object]) -> tuple[bytes, str]:
    """The file's bytes for `body`, and the CRC in its first line. Keys are sorted, so equal bodies are equal bytes; NaN
    is refused."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    checksum = crc(text)
    return checksum.encode() + b"\n" + text, checksum


def decode(path: Path) -> tuple[dict[str, object], str]:
    """The body of the file at `path` and its CRC. Raises Damaged naming the file if it is missing, altered or no such
    file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing; restore it from a backup, continual does not guess what it held") from None
    line, newline, text = data.partition(b"\n")
    if not newline or line != crc(text).encode():
        raise Damaged(
            f"{path} is damaged: its contents do not have the checksum {line[:8]!r} in its first line; "
            "restore it from a backup"
        )

    def no_number(word: str) -> float:
        raise Damaged(f"{path} is damaged: {word} is no number; restore it from a backup")

    body = json.loads(text, parse_constant=no_number)
    if not isinstance(body, dict):
        raise Damaged(f"{path} is no JSON object")
    return cast("dict[str, object]", body), line.decode()
