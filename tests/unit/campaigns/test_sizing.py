"""The table of sizes against what the code says of the same shapes: the part of it that no machine changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from continual import making
from continual.config import Settings
from continual.engine.needs import state_bytes
from continual.rules import rule
from continual.texts import size
from tests.campaigns.bench import sizing
from tests.helpers.pages import DOCS

ROWS = re.findall(
    r"^\| (\w\S*B) \| (.+?) \| `([\w-]+)` \| (?:at most )?(.+?) \|", (DOCS / "sizing.md").read_text(), re.M
)


def test_every_size_is_there_under_every_rule() -> None:
    forms = [*sizing.RULES, "--adapters"]
    assert [(name, form) for name, _, form, _ in ROWS] == [(name, form) for name in sizing.MODELS for form in forms]


@pytest.mark.parametrize("name", ["0.5B", "8B"])
def test_generations_are_as_large_as_the_code_makes_them(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    nbytes = sizing.headers(sizing.MODELS[name], base)
    with (base / "model.safetensors").open("ab") as file:
        file.truncate(file.tell() + nbytes)
    said = {form: taken for model, _, form, taken in ROWS if model == name}
    assert {weights for model, weights, _, _ in ROWS if model == name} == {size(nbytes)}
    recipe = making.recipe_for(Settings(), rule=sizing.RULES[0], options={}, before=None)
    with making.described(base, recipe) as model:
        found = {other: size(state_bytes(rule(other), model.specs)) for other in sizing.RULES}
    assert found == {form: taken for form, taken in said.items() if form != "--adapters"}
