"""Calibration rows and prompts as files hold them, read strictly. What a row means is an objective's to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from continual.errors import Misconfigured


class Row(NamedTuple):
    """A line of a file of calibration rows."""

    line: int
    text: str
    label: str | int | None


def read_rows(file: Path, *, labelled: bool) -> list[Row]:
    """The rows of a JSONL file; empty lines are passed over. Raises Misconfigured naming the line and what is wrong
    with it."""
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            body = json.loads(line)
        except ValueError as error:
            raise Misconfigured(f"{where}: no JSON ({error})") from None
        if not isinstance(body, dict) or not isinstance(body.get("text"), str):
            raise Misconfigured(f'{where}: write an object with a text, as {{"text": "…", "label": "…"}}')
        label = body.get("label")
        if labelled and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise Misconfigured(
                f"{where}: {'no label' if label is None else f'the label is {label!r}'}; it has to be a name or a number"
            )
        rows.append(Row(number, body["text"], label if labelled else None))
    if not rows:
        raise Misconfigured(f"{file}: no row in it")
    return rows


def read_heads(file: Path) -> dict[str, list[str]]:
    """Label to prompts. Raises Misconfigured saying what is wrong."""
    try:
        body = json.loads(_text(file))
    except ValueError as error:
        raise Misconfigured(f"{file}: no JSON ({error})") from None
    if not isinstance(body, dict) or len(body) < 2:
        raise Misconfigured(f"{file}: write an object of at least two labels, each with a list of prompts")
    for label, prompts in body.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise Misconfigured(f"{file}: the label {label!r} needs a list of prompts")
    return body


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise Misconfigured(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{file}: not UTF-8 ({error})") from None
