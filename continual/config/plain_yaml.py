"""A file of YAML that somebody else wrote, read as plain data and within limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from continual.errors import Misconfigured
from continual.outside import Irregular, read_regular

LARGEST = 1 << 20
"""Bytes of the largest file that is read."""


def read(file: Path) -> dict[str, object]:
    """The table that a file holds. Raises Misconfigured for a file that cannot be read, for a key twice, and for what
    is no table with names as keys."""
    try:
        return parse(read_regular(file, LARGEST).decode("utf-8"))
    except OSError as error:
        raise Misconfigured(str(error) if isinstance(error, Irregular) else f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise Misconfigured(f"{file}: no YAML that can be read ({str(error)[:300]})") from None


def parse(text: str) -> dict[str, object]:
    """The table that a text holds. Raises ValueError for what `read` refuses."""
    import yaml  # type: ignore[import-untyped]

    try:
        _check_once(yaml.compose(text, yaml.SafeLoader))
        body = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise ValueError("write a table with names as keys")
    return body


def _check_once(node: Any) -> None:
    """Raises ValueError for a key that a table has twice: YAML takes the last, and nobody sees it. Aliases are
    refused, too: a short text could stand for any amount."""
    seen, todo = set[int](), [node]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            raise ValueError("an alias (*name): write it out")
        seen.add(id(one))
        if isinstance(getattr(one, "value", None), list):
            keys = [pair[0].value for pair in one.value if isinstance(pair, tuple)]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"the key {twice!r} twice in one table, line {one.start_mark.line + 1}")
            todo += [part for pair in one.value for part in (pair if isinstance(pair, tuple) else (pair,))]
