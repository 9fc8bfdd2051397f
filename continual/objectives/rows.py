"""Calibration rows and prompts as files hold them, read strictly. What a row means, an objective says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from continual.errors import Misconfigured
from continual.outside import Irregular, Malformed, open_regular, parse_json, read_regular, shown
from continual.records import FileDigest

_LARGEST = 1 << 30
"""Bytes of the largest file of rows."""


class Example(NamedTuple):
    """A line of a file of calibration rows. `line` is its number, from 1; `prompt` what the text answers, "" where it
    answers nothing."""

    line: int
    text: str
    label: str | int | None
    prompt: str = ""


def read_rows(file: str | Path, *, labelled: bool) -> list[Example]:
    """The rows of a JSONL file; empty lines are passed over. Raises Misconfigured naming the line and what is wrong
    with it."""
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            body = parse_json(line.encode())
        except Malformed as error:
            raise Misconfigured(f"{where}: no JSON ({error})") from None
        text = body.get("text") if isinstance(body, dict) else None
        if not isinstance(body, dict) or not isinstance(text, str):
            raise Misconfigured(f'{where}: write an object with a text, as {{"text": "…", "label": "…"}}')
        label = body.get("label")
        if labelled and (isinstance(label, bool) or not isinstance(label, int | str)):
            what = "no label" if label is None else f"the label is {shown(label)}"
            raise Misconfigured(f"{where}: {what}; it has to be a name or a number")
        prompt = body.get("prompt", "")
        if not isinstance(prompt, str):
            raise Misconfigured(f"{where}: the prompt is {shown(prompt)}; it has to be a text")
        rows.append(Example(number, text, label if labelled else None, prompt))
    if not rows:
        raise Misconfigured(f"{file}: no row in it")
    return rows


def read_heads(file: str | Path) -> dict[str, list[str]]:
    """Label to prompts, of a JSON file. Raises Misconfigured saying what is wrong."""
    try:
        body = parse_json(_text(file).encode())
    except Malformed as error:
        raise Misconfigured(f"{file}: no JSON ({error})") from None
    if not isinstance(body, dict) or len(body) < 2:
        raise Misconfigured(f"{file}: write an object of at least two labels, each with a list of prompts")
    for label, prompts in body.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise Misconfigured(f"{file}: the label {label!r} needs a list of prompts")
    return body


def file_digest(file: str | Path) -> FileDigest:
    """The name of a file and the BLAKE3 digest of its bytes. Raises Misconfigured where it cannot be read."""
    return FileDigest(Path(file).name, f"blake3:{blake3(_bytes(file)).hexdigest()}")


def must_be_readable(file: str | Path) -> None:
    """Raises Misconfigured where a file cannot be opened, or is no regular file. Nothing of it is read."""
    with _misconfigured(file):
        os.close(open_regular(file))


def _text(file: str | Path) -> str:
    try:
        return _bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{file}: not UTF-8 ({error})") from None


def _bytes(file: str | Path) -> bytes:
    with _misconfigured(file):
        return read_regular(file, _LARGEST)


@contextmanager
def _misconfigured(file: str | Path) -> Iterator[None]:
    """Says what is wrong with a file that a user named."""
    try:
        yield
    except Irregular:
        raise Misconfigured(f"{file}: is no regular file") from None
    except OSError as error:
        raise Misconfigured(f"{file}: {error.strerror}") from None
    except Malformed as error:
        raise Misconfigured(f"{file}: {error}") from None
