"""Options of rules and transforms: how one is declared, and the checks that they share. No rule lives here.

The options of a rule are the fields of a frozen dataclass. A field says everything once: its name, its type, which
values are allowed, what it is for, and its default:

    alpha: Annotated[float, Number(least=0.0, below=1.0), "share of Σσ whose directions are protected"] = 0.5
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from continual.errors import Misconfigured

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

O = TypeVar("O", bound="DataclassInstance")  # noqa: E741 - the dataclass of one rule's options


class Allowed(Protocol):
    """Which values an option takes. Its text completes the sentence "it has to be …"."""

    def __call__(self, value: object) -> object:
        """The value as the rule gets it. Raises ValueError for a value that is not allowed."""
        ...


class Option(NamedTuple):
    """One option: its default as plain data (a list, not a tuple), which values are allowed, and what it is for."""

    name: str
    default: object
    allowed: Allowed
    help: str


@dataclass(frozen=True)
class NoOptions:
    """The options of a rule that has none."""


@dataclass(frozen=True)
class Number:
    """A finite number within bounds: `least` and `most` belong to them, `above` and `below` do not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __call__(self, value: object) -> float:
        """The number as a float. Raises ValueError."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._within(value):
            raise ValueError(str(self))
        return float(value)

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        return f"a number {' and '.join(said)}" if said else "a number"

    def _within(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Whole:
    """A whole number."""

    def __call__(self, value: object) -> int:
        """The number. Raises ValueError."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return "a whole number"


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    def __call__(self, value: object) -> bool:
        """The flag. Raises ValueError."""
        if not isinstance(value, bool):
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def __call__(self, value: object) -> str:
        """The word. Raises ValueError."""
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Globs:
    """A list of globs over tensor names, as `fnmatch` reads them."""

    def __call__(self, value: object) -> tuple[str, ...]:
        """The globs. Raises ValueError."""
        if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
            raise ValueError(str(self))
        return tuple(value)

    def __str__(self) -> str:
        return "a list of globs over tensor names"


def declared(options: type[DataclassInstance]) -> dict[str, Option]:
    """Every option that the dataclass `options` declares, by name and in order."""
    hints = typing.get_type_hints(options, include_extras=True)
    found = {}
    for field in dataclasses.fields(options):
        _, allowed, text = typing.get_args(hints[field.name])
        found[field.name] = Option(field.name, _plain(field.default), allowed, text)
    return found


def resolve(what: str, options: type[O], given: Mapping[str, object]) -> O:
    """The options of `what` (a name for messages) with their values; those not given take their defaults.

    `options` is the dataclass that declares them. Raises Misconfigured for an unknown option, or a value that is not
    allowed.
    """
    known = declared(options)
    for unknown in sorted(set(given) - set(known)):
        raise Misconfigured(
            f"{what}: unknown option {unknown!r}; its options are: {', '.join(sorted(known)) or 'none'}"
        )
    values = {}
    for name, value in given.items():
        try:
            values[name] = known[name].allowed(value)
        except ValueError as error:
            raise Misconfigured(f"{what}: {name} = {value!r} has to be {error}") from None
    return dataclasses.replace(options(), **values)


def plain(options: DataclassInstance) -> dict[str, object]:
    """All options by name as plain data, as the state keeps them."""
    return {name: _plain(getattr(options, name)) for name in declared(type(options))}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
