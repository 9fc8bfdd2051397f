"""Where settings are given: in a TOML file, in `CONTINUAL_*` variables, by flags; the later wins. No other module reads
settings from the environment."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import stat
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from continual.config.settings import Settings
from continual.config.values import pairs
from continual.errors import Misconfigured

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "CONTINUAL_"
FILE = "CONTINUAL_CONFIG"
"""The variable that names the settings file. It is no setting."""
NO_SETTINGS = (FILE, "CONTINUAL_DEBUG")
"""Variables that are no settings: CONTINUAL_DEBUG has a command show the trace of an error."""
_SECRET = re.compile(r"(?i)(secret|token|password)$")
"""Names of settings of which no message has the value."""
LARGEST = 1 << 20
"""Bytes of a settings file that are read."""
TABLES = ("gates", "hub", "release", "rounds", "sources")
"""Settings that are tables, of which a variable or a flag changes some keys."""


class Setting(NamedTuple):
    """A setting that was given: its name, its value, and for messages where it was set and how it is called there."""

    name: str
    value: object
    by: str
    called: str


class Looked(NamedTuple):
    """The settings in force, and where each that was given was set: by its whole name, as `hub.poll` of a table, the
    file, `environment` or `flag`, with what it is called there. What is not in it has its default."""

    settings: Settings
    where: Mapping[str, str]


def load(
    flags: Mapping[str, object], *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """The settings from `file` (default: the file that `CONTINUAL_CONFIG` names, if it does), the environment and
    `flags`, by name; a flag that is None or an empty list was not given.

    Raises Misconfigured naming every setting that is wrong, where it was set and what is wrong with it.
    """
    return look(flags, file=file, environ=environ).settings


def look(flags: Mapping[str, object], *, file: Path | None = None, environ: Mapping[str, str] | None = None) -> Looked:
    """The same, and where each setting was set. Raises Misconfigured as `load` does."""
    environ = os.environ if environ is None else environ
    if file is None and environ.get(FILE):
        file = Path(environ[FILE])
    given = [] if file is None else [Setting(name, value, str(file), name) for name, value in _toml(file).items()]
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and variable not in NO_SETTINGS:
            given.append(Setting(variable.removeprefix(PREFIX).lower(), text, "environment", variable.upper()))
    given += [Setting(name, value, "flag", name) for name, value in flags.items() if value is not None and value != []]
    wrong = [_unknown(one.name, f"{one.by}: unknown setting {one.called!r}") for one in given if not _known(one.name)]
    values: dict[str, object] = {}
    where: dict[str, str] = {}
    parts: dict[str, str] = {}
    for one in given:
        if not _known(one.name):
            continue
        where[one.name] = f"{one.by}: {one.called}"
        before = values.get(one.name)
        values[one.name] = _over(before, one, where[one.name])
        if values[one.name] is one.value or not isinstance(before, dict):  # else it changes some keys of a table
            parts = {name: by for name, by in parts.items() if name.partition(".")[0] != one.name}
        parts |= dict.fromkeys(_names(one), where[one.name])
    return Looked(_validated(values, where, wrong), parts)


def _names(given: Setting) -> list[str]:
    """The whole names of what was given: of a table each key that it has."""
    value = given.value
    if given.name in TABLES and not isinstance(value, dict):
        with contextlib.suppress(ValueError):  # the field says what is wrong with it
            value = pairs(value)
    return _leaves(given.name, value)


def _leaves(name: str, value: object) -> list[str]:
    if not isinstance(value, dict):
        return [name]
    return [leaf for key, one in value.items() for leaf in _leaves(f"{name}.{key}", one)]


def settings_of(values: Mapping[str, object]) -> Settings:
    """The settings of a program: from these values alone, by name. Raises Misconfigured naming all that is wrong."""
    wrong = [_unknown(name, f"unknown setting {name!r}") for name in values if not _known(name)]
    return _validated({name: value for name, value in values.items() if _known(name)}, {}, wrong)


def _over(before: object, given: Setting, where: str) -> object:
    """The value that `given` makes of the one before. Of a table, pairs say what differs from it."""
    if given.name not in TABLES or not isinstance(before, dict) or isinstance(given.value, dict):
        return given.value
    try:
        found = pairs(given.value)
    except ValueError as error:
        raise Misconfigured(f"{where}: {error}") from None
    if not isinstance(found, dict):
        raise Misconfigured(f"{where}: {given.value!r} is no key=value")
    return before | found


def _known(name: str) -> bool:
    return name in Settings.model_fields


def _unknown(name: str, trouble: str) -> str:
    """What is said of a setting that there is not: the nearest there is, and all."""
    known = sorted(Settings.model_fields)
    return f"{trouble}; {_near(name, known)}known are {', '.join(known)}"


def _near(name: str, known: Sequence[str]) -> str:
    """The question whether another name was meant; empty where none is near."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]!r}? " if found else ""


def _validated(values: Mapping[str, object], where: Mapping[str, str], wrong: Sequence[str]) -> Settings:
    """`where` says of each setting where it was set; `wrong` is what was found before. Raises Misconfigured for all
    that cannot be used, one a line."""
    found = list(wrong)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        found += [_trouble(one, where) for one in error.errors()]
    else:
        if not found:
            return settings
    raise Misconfigured("\n".join(found))


def _trouble(found: ErrorDetails, where: Mapping[str, str]) -> str:
    """What is wrong with a setting, by what pydantic says of it."""
    name, *within = (str(part) for part in found["loc"])
    setting = ".".join([where.get(name, name), *within])
    if found["type"] == "extra_forbidden":
        known = sorted(_keys(Settings, [name, *within][:-1]))
        return f"{setting}: unknown; {_near(within[-1], known)}known are {', '.join(known)}"
    value = "..." if _SECRET.search(setting) else _cut(found["input"])
    return f"{setting} = {value}: {_WORDS.get(found['type'], found['msg']).removeprefix('Value error, ')}"


_WORDS = {"tuple_type": "write a list: [...]", "model_type": "write a table of its keys", "dict_type": "write a table"}
"""What is said where pydantic speaks of Python's types."""


def _keys(kind: object, path: Sequence[str]) -> Collection[str]:
    """The keys of the table at `path` in a value of this type; none where there is no such table."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not path:
            return kind.model_fields.keys()
        return _keys(kind.model_fields[path[0]].annotation, path[1:]) if path[0] in kind.model_fields else ()
    within = path[1:] if get_origin(kind) in (dict, tuple, list, Mapping) else path
    return next((found for one in get_args(kind) if (found := _keys(one, within))), ())


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _toml(file: Path) -> dict[str, object]:
    """Raises Misconfigured for a file that cannot be read."""
    try:
        return tomllib.loads(_read(file).decode("utf-8"))
    except OSError as error:
        raise Misconfigured(f"settings file {file}: {error.strerror}") from None
    except RecursionError:
        raise Misconfigured(f"settings file {file}: tables or arrays lie too deep in each other") from None
    except ValueError as error:  # of TOML, of UTF-8, of a number
        raise Misconfigured(f"settings file {file}: {error}") from None


def _read(file: Path) -> bytes:
    """The bytes of the file; a pipe or a device is not waited for. Raises OSError and Misconfigured."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise Misconfigured(f"settings file {file}: it is no regular file")
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise Misconfigured(f"settings file {file}: it is larger than {LARGEST} bytes")
    return data
