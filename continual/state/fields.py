"""Frozen dataclasses as JSON bodies, and back: a field's name is its key, its type is checked. No class of record lives
here.

Types that a field can have: str, int, float, bool, a Literal, a dataclass, `tuple` and `Mapping` of these, a union of
them, `Totals`, and `object` for anything. Metadata that it can have: `OMITTED`, `KEY`, `REST` (records.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from continual.errors import Damaged
from continual.records import KEY, OMITTED, REST, Totals

T = TypeVar("T")
Check = Callable[[object], object]
"""Gives the value of a field for a value of a JSON body. Raises Wrong."""


class Wrong(Exception):
    """A value of a body has another type than its field: `keys` lead to it, the innermost first."""

    def __init__(self, what: str, *keys: str) -> None:
        super().__init__(what)
        self.keys = list(keys)


def body_of(record: object) -> dict[str, object]:
    """The JSON body of a dataclass instance."""
    assert dataclasses.is_dataclass(record), record
    found: dict[str, object] = {}
    kind: type = type(record)
    for field in _known(kind):
        value = getattr(record, field.name)
        if field.rest:
            found |= value
        elif value is not None or not field.omitted:
            found[field.key] = _plain(value)
    return found


def record_of(kind: type[T], body: object, where: object, path_of: Callable[[str], str] = str) -> T:
    """An instance of the dataclass `kind` from its JSON body. Keys that it does not know are left out.

    Raises Damaged naming `where` and the key that is missing or has another type; `path_of` gives the path of a key in
    the file, where that is not the key.
    """
    try:
        return cast(T, _instance(kind, body))
    except Wrong as wrong:
        keys = wrong.keys[::-1]
        keys[:1] = [path_of(key) for key in keys[:1]]
        raise Damaged(f"{where}: {'.'.join(keys) or 'the record'} {wrong}") from None


class _Known(NamedTuple):
    """A field of a dataclass: `required` where it has no default; `rest`: it takes the keys that no other field has."""

    name: str
    key: str
    check: Check
    required: bool
    omitted: bool
    rest: bool


@functools.cache
def _known(kind: type) -> tuple[_Known, ...]:
    hints = get_type_hints(kind)
    return tuple(
        _Known(
            name=field.name,
            key=str(field.metadata.get(KEY, field.name)),
            check=_check(hints[field.name]),
            required=field.default is field.default_factory is dataclasses.MISSING,
            omitted=bool(field.metadata.get(OMITTED)),
            rest=bool(field.metadata.get(REST)),
        )
        for field in dataclasses.fields(kind)
    )


def _plain(value: object) -> object:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Totals):
        return value.body()
    return body_of(value) if dataclasses.is_dataclass(value) else value


def _instance(kind: type, body: object) -> object:
    if not isinstance(body, dict):
        raise Wrong(f"is {body!r:.60}, no object")
    known = _known(kind)
    values = {}
    for name, key, check, required, _, rest in known:
        if rest:
            names = {other.key for other in known}
            values[name] = check({key: item for key, item in body.items() if key not in names})
        elif key in body:
            try:
                values[name] = check(body[key])
            except Wrong as wrong:
                wrong.keys.append(key)
                raise
        elif required:
            raise Wrong("is missing", key)
    return kind(**values)


def _at(key: object, check: Check, value: object) -> object:
    try:
        return check(value)
    except Wrong as wrong:
        wrong.keys.append(str(key))
        raise


def _check(kind: object) -> Check:
    """What reads a value of the type `kind`."""
    origin, of = get_origin(kind), get_args(kind)
    if kind is object:
        return lambda value: value
    if kind is float:
        return _number
    if isinstance(kind, type) and kind in _NAMES:
        return _exactly(kind)
    if kind is Totals:
        return _totals
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return functools.partial(_instance, kind)
    if origin is Literal:
        return functools.partial(_one_of, of)
    if origin in (Union, types.UnionType):
        parts = tuple(_check(part) for part in of if part is not type(None))
        one = parts[0] if len(parts) == 1 else functools.partial(_any_of, parts)
        return _or_null(one) if type(None) in of else one
    if origin is tuple and of[-1] is Ellipsis:
        return functools.partial(_items, _check(of[0]))
    if origin is tuple:
        return functools.partial(_places, tuple(_check(part) for part in of))
    assert origin is Mapping, kind
    return functools.partial(_mapping, _check(of[1]))


def _exactly(kind: type) -> Check:
    def check(value: object) -> object:
        if type(value) is not kind:
            raise Wrong(f"is {value!r:.60}, no {_NAMES[kind]}")
        return value

    return check


_NAMES = {str: "text", int: "whole number", bool: "true or false"}


def _number(value: object) -> float:
    if (type(value) is not float and type(value) is not int) or not math.isfinite(value):
        raise Wrong(f"is {value!r:.60}, no finite number")
    return value


def _totals(value: object) -> Totals:
    if not isinstance(value, Mapping):
        raise Wrong(f"is {value!r:.60}, no object")
    for key, item in value.items():
        _at(key, _number, item)
    return Totals.of(value)


def _one_of(words: tuple[object, ...], value: object) -> object:
    if value not in words:
        raise Wrong(f"is {value!r:.60}, none of {', '.join(map(str, words))}")
    return value


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _any_of(checks: tuple[Check, ...], value: object) -> object:
    """The value as the first of several types that it has; of none, the first one's complaint is raised."""
    first: Wrong | None = None
    for check in checks:
        try:
            return check(value)
        except Wrong as wrong:
            first = first or wrong
    assert first is not None
    raise first


def _items(check: Check, value: object) -> object:
    if not isinstance(value, list | tuple):
        raise Wrong(f"is {value!r:.60}, no list")
    return tuple([_at(number, check, item) for number, item in enumerate(value)])


def _places(checks: tuple[Check, ...], value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != len(checks):
        raise Wrong(f"is {value!r:.60}, no list of {len(checks)}")
    return tuple(_at(number, check, item) for number, (check, item) in enumerate(zip(checks, value, strict=True)))


def _mapping(check: Check, value: object) -> object:
    if not isinstance(value, Mapping):
        raise Wrong(f"is {value!r:.60}, no object")
    return {key: _at(key, check, item) for key, item in value.items()}
