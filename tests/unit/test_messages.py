"""What messages advise, read from the code: a setting, a value, a command or a flag that they name is one that there
is, and a refusal that a setting lifts says which and is looked at again once it has another value."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from continual.cli.main import app
from continual.config import Settings
from continual.errors import Misconfigured
from continual.gates import GATES, make, setting
from tests.helpers import house

FIELDS = {field.name: setting(gate, field.name) for gate in GATES for field in dataclasses.fields(gate)}
"""The settings of gates: how the gate calls it, and how a person does."""
SET = re.compile(r"(?<![\w.-])((?:gates\.)?[a-z][a-z_]*(?:\.[a-z_]+)*) = ([a-z][\w-]*)")
"""A setting and a word that it is set to."""


def text_of(node: ast.AST) -> str:
    """A text as it stands in the code; what is filled in is `{}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "{}"


@cache
def texts() -> tuple[tuple[str, str], ...]:
    """Every text of the package that is no docstring, with where it stands."""
    return tuple(_texts())


def _texts() -> Iterator[tuple[str, str]]:
    for name, module in house.modules().items():
        inner: set[int] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Expr):
                inner.add(id(node.value))
            elif isinstance(node, ast.JoinedStr):
                inner |= {id(part) for part in ast.walk(node) if part is not node}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in inner and (text := text_of(node)):
                yield f"{name}:{node.lineno}", text


def calls(word: str) -> Iterator[tuple[str, ast.Call]]:
    for name, module in house.modules().items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == word:
                yield f"{name}:{node.lineno}", node


def commands(found: Any, *before: str) -> Iterator[tuple[str, Any]]:
    """Every command by its words (`pool why`), with the groups."""
    yield " ".join(before), found
    for name, inner in getattr(found, "commands", {}).items():
        yield from commands(inner, *before, name)


KNOWN = dict(commands(typer.main.get_command(app)))
OTHERS = {"--enable-lora", "--safe_serialization", "--help", "--head", "--address"} | {
    f"--{flag}" for flag in ("model", "model_args", "tasks", "limit", "log_samples", "output_path", "num_fewshot")
}
"""Flags of other programs."""


def test_every_command_that_a_text_names_is_there() -> None:
    named, wrong = 0, []
    for where, text in texts():
        for words in re.findall(r"(?:'continual|(?:that|Next|or): continual) ((?:[a-z-]+ ?)+)", text):
            named += 1
            if words.split()[0] not in KNOWN:
                wrong.append((where, words))
    assert named > 30
    assert wrong == []


def test_every_flag_that_a_text_names_is_there() -> None:
    flags = {
        name
        for command in KNOWN.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    said = [
        (where, text) for where, text in texts() if "{color-scheme:" not in text
    ]  # a style sheet has names like these
    named = [(where, flag) for where, text in said for flag in re.findall(r"(?<![\w-])(--[a-z][a-z_-]+)", text)]
    assert len(named) > 30
    assert [found for found in named if found[1] not in flags | OTHERS] == []


def test_every_setting_of_a_gate_that_a_text_names_is_there_and_takes_the_value() -> None:
    named = 0
    for where, text in texts():
        for name, value in SET.findall(text):
            if name.startswith("gates."):
                _, gate, key = name.split(".")
                given: dict[str, object] = {"gates": {gate: {key: value}}}
            elif name in Settings.model_fields:
                given = {name: value}
            else:
                continue
            named += 1
            try:
                make(Settings.model_validate(given))
            except (ValidationError, Misconfigured) as error:
                pytest.fail(f"{where} advises {name} = {value}: {error}")
    assert named >= 8


def test_a_refusal_that_a_setting_lifts_says_which_and_goes_by_it() -> None:
    lifted = set()
    for where, call in calls("Refuse"):
        text = text_of(call.args[1]) if len(call.args) > 1 else ""
        by = next((k.value for k in call.keywords if k.arg == "by"), None)
        names = {name for name, _ in SET.findall(text)} & set(FIELDS.values())
        assert "--gate" not in text, f"{where}: who runs a daemon has a file, and no flags"
        if by is None:
            assert not names, f"{where} names {names}, and does not say that it goes by it"
        elif isinstance(by, ast.Tuple):
            fields = {str(word.value) for word in by.elts if isinstance(word, ast.Constant)}
            assert fields <= FIELDS.keys(), where
            for field in fields:
                assert FIELDS[field] in text, f"{where} goes by {FIELDS[field]}, and does not name it"
            lifted |= fields
    assert lifted >= {"vocab", "missing", "tied", "lineage", "extra", "carried", "differ", "updates"}
    assert lifted >= {"max_base_ratio", "max_mean_ratio"}
