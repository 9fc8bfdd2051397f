"""Options: each check takes what it says and nothing else, and what a rule declares is all there is."""

from __future__ import annotations

import math
import re

import pytest

from continual.errors import Misconfigured
from continual.rules import ROWS, TRANSFORMS, rule
from continual.rules.fisher import FileName
from continual.rules.options import Allowed, Choice, Flag, Globs, Number, Whole

CHECKS: list[tuple[Allowed, str, list[object], list[object]]] = [
    (Number(least=0.0, below=1.0), "a number at least 0 and below 1", [0, 0.0, 0.999], [1, 1.0, -1e-9, 2]),
    (Number(above=0.0, most=1.0), "a number above 0 and at most 1", [1e-9, 1], [0, 0.0, 1.0001, -1]),
    (Number(least=1e-3), "a number at least 0.001", [1e-3, 1e300], [9e-4, 0]),
    (Number(), "a number", [-1e300, 0, 7], []),
    (Whole(), "a whole number", [0, -3, 1 << 70], [0.0, 1.5]),
    (Flag(), "true or false", [True, False], [0, 1]),
    (Choice(("model", "tensor")), "one of model, tensor", ["model", "tensor"], ["Model", ""]),
    (Globs(), "a list of globs over tensor names", [[], ["*.weight", "b"], ("a",)], [[""], [1], "*.weight", {"a": 1}]),
    (FileName(), "the name of a safetensors file in the fine-tune's directory", ["f.safetensors"], ["a/f.safetensors"]),
]
NEVER: list[object] = [None, "text", [1], math.nan, math.inf, -math.inf, {}, object()]


@pytest.mark.parametrize(("allowed", "words", "good", "bad"), CHECKS, ids=[words for _, words, _, _ in CHECKS])
def test_a_check_takes_what_it_says(allowed: Allowed, words: str, good: list[object], bad: list[object]) -> None:
    assert str(allowed) == words
    for value in good:
        assert allowed(value) == (tuple(value) if isinstance(value, list) else value)
    for value in [*bad, *NEVER, *([] if isinstance(allowed, Flag) else [True, False])]:
        with pytest.raises(ValueError, match=re.escape(words)):
            allowed(value)


def test_a_number_becomes_a_float() -> None:
    assert isinstance(Number()(1), float)


@pytest.mark.parametrize("row", [*ROWS.values(), *TRANSFORMS.values()], ids=lambda row: row.name)
def test_every_default_is_an_allowed_value_and_says_what_it_is_for(row: object) -> None:
    for name, option in row.declared.items():  # type: ignore[attr-defined]
        value = option.allowed(option.default)
        assert (list(value) if isinstance(value, tuple) else value) == option.default
        assert option.name == name
        assert len(option.help) > 10


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_has_all_its_options_as_plain_data_and_is_made_again_from_them(name: str) -> None:
    made = rule(name)
    assert made.name == name
    assert made.options == {key: option.default for key, option in ROWS[name].declared.items()}
    assert rule(name, made.options).options == made.options


def test_what_is_given_stands_beside_the_defaults() -> None:
    found = rule("opcm", {"alpha": 0, "include": ("a*",)})
    assert found.options == {"alpha": 0.0, "variant": "block", "include": ["a*"]}
    assert isinstance(found.options["alpha"], float)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("opcm", {"alpha": 1.0}, "rule opcm: alpha = 1.0 has to be a number at least 0 and below 1"),
        ("opcm", {"beta": 1, "alpha": 9}, "rule opcm: unknown option 'beta'; its options are: alpha, include, variant"),
        ("mean", {"alpha": 1}, "rule mean: unknown option 'alpha'; its options are: none"),
        ("middle", {}, "unknown rule 'middle'; the rules are: "),
        ("frank-wolfe", {"before": ["trim"]}, "frank-wolfe weighs the task vectors as they are"),
        ("mean", {"before": [{"name": "drop", "rate": "x"}]}, "transform drop: rate = 'x' has to be a number at least"),
        ("mean", {"before": [7]}, "before: unknown transform 7; the transforms are: trim, drop, breadcrumbs"),
    ],
)
def test_what_is_refused_is_named_with_what_is_allowed(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(Misconfigured) as raised:
        rule(name, options)
    assert words in str(raised.value)
