"""How the value of a setting may be written, and what it is then. A flag and a variable are texts; a file has types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, PlainSerializer, SecretStr

from continual.errors import Misconfigured
from continual.records import SCHEME
from continual.stores import ObjectPath, on_disk, where

_LONG_ENOUGH = 16
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def place(given: object) -> object:
    """A directory, or a place on an object store. Anything else is passed on, and the field refuses it. Raises
    ValueError for an object store without bucket or prefix."""
    if not isinstance(given, str | Path | ObjectPath):
        return given
    try:
        return where(given)
    except Misconfigured as error:
        raise ValueError(str(error)) from None


def file(given: Path) -> Path:
    """A file or directory on this machine. Raises ValueError for an address."""
    try:
        return on_disk(given)
    except Misconfigured as error:
        raise ValueError(str(error)) from None


def parse_bytes(text: object) -> object:
    """`4GB`, `512MiB`, `1000` as a number of bytes. Anything else is passed on, and the field refuses it."""
    if isinstance(text, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())):
        return int(float(match[1]) * _UNITS[match[2] or ""])
    return text


def split(text: object) -> object:
    """A text as a list of its comma-separated parts; anything else is passed on."""
    return tuple(part for part in text.split(",") if part) if isinstance(text, str) else text


def pairs(given: object) -> object:
    """`key=value` pairs as a table of texts, which the fields read: from a flag (a list) or a variable (one text, with
    commas between the pairs). Anything else is passed on. Raises ValueError for what is no pair."""
    parts = [part for part in given.split(",") if part] if isinstance(given, str) else given
    if not isinstance(parts, list | tuple):
        return given
    table: dict[str, str] = {}
    for part in parts:
        key, equals, value = str(part).partition("=")
        if not equals or not key:
            raise ValueError(f"{part!r} is no key=value, as size=4")
        table[key.strip()] = value.strip()
    return table


def by_name(given: object) -> object:
    """`name.key=value` pairs as a table for each name (of a gate, or of a source); the later wins. Raises ValueError
    for what is no pair."""
    table = pairs(given)
    if not isinstance(table, dict):
        return table
    found: dict[str, object] = {}
    for name, value in table.items():
        of, dot, key = str(name).partition(".")
        before = found.get(of, {})
        if dot:
            value = {key: value}
        found[of] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def unset(given: object) -> object:
    """None for an empty text: a variable that is set to nothing."""
    return None if given == "" else given


def long_enough(given: SecretStr) -> SecretStr:
    """A word that nobody guesses. Raises ValueError for a short one."""
    if len(given.get_secret_value()) < _LONG_ENOUGH:
        raise ValueError(f"a secret of at least {_LONG_ENOUGH} characters, as 'openssl rand -hex 32' makes one")
    return given


def written(given: object) -> object:
    """A number as its text, where a text is wanted that may be a number."""
    return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given


def rank(given: object) -> object:
    """A rank from 1 on, or `own`. Raises ValueError for anything else."""
    found = int(given) if isinstance(given, str) and given.isdecimal() else given
    if found in (None, "own") or (isinstance(found, int) and not isinstance(found, bool) and found > 0):
        return found
    raise ValueError("write a rank, as 16, or own")


def repos(text: object) -> object:
    """The ids of repos, which may be written with `hf://` before them; separated by commas in a text."""
    found = split(text)
    return tuple(str(part).removeprefix(SCHEME) for part in found) if isinstance(found, tuple | list) else found


Home = Annotated[InstanceOf[Path] | InstanceOf[ObjectPath], BeforeValidator(place), PlainSerializer(str)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Texts = Annotated[tuple[str, ...], BeforeValidator(split)]
Repos = Annotated[tuple[str, ...], BeforeValidator(repos)]
File = Annotated[Path, AfterValidator(file)]
Paths = Annotated[tuple[File, ...], BeforeValidator(split)]
Seconds = Annotated[float, Field(ge=0)]
Secret = Annotated[SecretStr | None, BeforeValidator(unset)]
"""A word that nobody is to see; None for an empty text."""
LongSecret = Annotated[Annotated[SecretStr, AfterValidator(long_enough)] | None, BeforeValidator(unset)]
"""The same, and one that nobody guesses."""
