"""From what was typed to what the API takes: the options of a rule, and what a candidate of `tune` is worth by."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from continual.errors import Misconfigured

if TYPE_CHECKING:
    from continual.config import Settings
    from continual.engine.views import ReadView
    from continual.service.control.requests import Asking
    from continual.tuning import Evaluation

R = TypeVar("R", bound="Asking")


def parse_options(pairs: Sequence[str]) -> dict[str, object]:
    """Options of a rule from `key=value` pairs. A value is read as TOML where it is that, else as text.
    Raises Misconfigured for what is no pair."""
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise Misconfigured(f"option {pair!r}: write it as key=value, as alpha=0.5")
        try:
            options[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = value.strip()
    return options


def rank_of(text: str) -> int | None:
    """The rank of an adapter, None for `own`. Raises Misconfigured for anything else."""
    if text == "own":
        return None
    try:
        return int(text)
    except ValueError:
        raise Misconfigured(f"--as-lora {text}: write a rank, as 16, or own") from None


@dataclass(frozen=True, slots=True)
class ViewFlags:
    """The flags that say how a state of adapters is read, as they were typed."""

    rule: str | None = None
    scale: str | None = None
    lines: str | None = None
    only: Sequence[str] | None = None
    without: Sequence[str] | None = None
    weights: Sequence[str] | None = None
    options: Sequence[str] | None = None

    def view(self, settings: Settings, name: str | None = None) -> ReadView:
        """The view that they describe, or what they make of the one that the settings call `name`. Raises Misconfigured
        for a weight that is no `NAME=W`, an option that is no `KEY=VALUE`, and a view that there is not."""
        from continual.engine.views import ReadView, view_of

        weights = {}
        for pair in self.weights or ():
            model, _, value = pair.rpartition("=")
            try:
                weights[model] = float(value)
            except ValueError:
                model = ""
            if not model:
                raise Misconfigured(f"weight {pair!r}: write it as NAME=W, as alice=0.5")
        only, without = tuple(self.only or ()), tuple(self.without or ())
        options = parse_options(self.options or ())
        typed = ReadView(self.rule, options, self.scale, self.lines, only, without, weights)
        return typed if name is None else view_of(settings, name).changed(typed)


def request(kind: type[R], **fields: object) -> R:
    """A request of what was typed. Raises Misconfigured naming what cannot be used."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise Misconfigured(f"{' '.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def record(word: str | None) -> int | str | None:
    """The number of a record, or the word by which it was named."""
    return int(word) if word is not None and word.isascii() and word.isdecimal() and len(word) < 16 else word


def here(model: str) -> str:
    """The path that the word would be, as another process understands it, too."""
    return str(Path(model).absolute())


@dataclass(frozen=True, slots=True)
class Worth:
    """The flags of `tune` that say by what a candidate is worth something, as they were typed."""

    command: str | None
    rows: Sequence[Path]
    objective: str | None
    heads: Sequence[Path]
    batch: int
    key: str | None
    lower: bool
    timeout: float | None

    def evaluation(self) -> Evaluation:
        """The evaluation that they describe. Raises Misconfigured for flags that do not go together, or values that
        cannot be used."""
        from continual.tuning import Command, Rows

        if (self.command is None) == (not self.rows) or (not self.rows) != (self.objective is None):
            raise Misconfigured(
                "say what a candidate is worth: with --command 'eval.py {model}', or with --rows FILE --objective NAME"
            )
        if self.command is not None:
            if self.heads:
                raise Misconfigured("--heads goes with --rows")
            return Command(Command.split(self.command), self.key, self.lower, self.timeout)
        self._by_no_command()
        if len(self.rows) > 1 or len(self.heads) > 1:
            raise Misconfigured(
                "several files of rows, one for each task, are for --what layers, models-layers and inputs"
            )
        assert self.objective is not None
        return Rows(self.objective, self.rows[0], self.heads[0] if self.heads else None, self.batch)

    def learned(self) -> tuple[str, tuple[Path, ...], tuple[Path, ...]]:
        """The objective, the files of rows and those of prompts by which coefficients of layers are found. Raises
        Misconfigured for a command, which has no gradient."""
        if self.command is not None or self.objective is None:
            raise Misconfigured(
                "coefficients of layers follow from a gradient, which no --command has: name an objective with "
                "--rows FILE --objective NAME, or --objective module:function"
            )
        self._by_no_command()
        return self.objective, tuple(self.rows), tuple(self.heads)

    def run_on(self) -> tuple[str, tuple[Path, ...], tuple[Path, ...]]:
        """The objective, the files of rows and those of prompts on which the base is run. Raises Misconfigured for a
        command, which is no model in memory."""
        if self.command is not None or self.objective is None:
            raise Misconfigured(
                "inputs of layers are those of a model in memory, which no --command has: name an objective with "
                "--rows FILE --for NAME --objective NAME, or --objective module:function"
            )
        self._by_no_command()
        return self.objective, tuple(self.rows), tuple(self.heads)

    def _by_no_command(self) -> None:
        if self.key is not None or self.lower or self.timeout is not None:
            raise Misconfigured("--key, --lower and --timeout go with --command")
