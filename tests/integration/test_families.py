"""A slice of the campaign of families: whole fine-tunes and LoRA of a few that differ most in names and layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.campaigns.families import page
from tests.campaigns.families.__main__ import cells_of
from tests.campaigns.families.family import Family
from tests.campaigns.families.judging import Cell, Truth, compared
from tests.campaigns.families.table import TABLE

pytestmark = pytest.mark.slow
SLICE = [family for family in TABLE if family.gate]
WANTED = ("full", "again", "LoRA")
REFUSED = {"Qwen3-MoE": {"LoRA"}}
"""Where a line says that the adapter is kept out: PEFT puts `all-linear` on packed experts too."""


@pytest.mark.parametrize("family", SLICE, ids=lambda family: family.name)
def test_what_is_folded_alone_is_the_fine_tune(family: Family, tmp_path: Path) -> None:
    cells = dict(cells_of(family, tmp_path, None, WANTED))
    for column in WANTED:
        allowed = ("right", "refused") if column in REFUSED.get(family.name, ()) else ("right",)
        assert cells[column].verdict in allowed, f"{column}: {cells[column]}"


BASE = {"a.weight": torch.tensor([1.0, 2.0]), "b.weight": torch.tensor([3.0])}
WHOLE = {"a.weight": torch.tensor([1.5, 2.0]), "b.weight": torch.tensor([4.0])}
ANSWER = torch.tensor([1.0])


@pytest.mark.parametrize(
    ("changed", "answer", "line", "verdict"),
    [
        ({}, ANSWER, "folded", "right"),
        ({"b.weight": BASE["b.weight"]}, ANSWER, "folded", "silent loss"),
        ({"b.weight": BASE["b.weight"]}, ANSWER, "folded; left out: x.b.weight", "told"),
        ({"b.weight": torch.tensor([3.5])}, ANSWER, "folded; left out: b.weight", "wrong"),
        ({"a.weight": torch.tensor([1.5, 2.0001]), "b.weight": BASE["b.weight"]}, ANSWER, "folded", "wrong"),
        ({"c.weight": torch.tensor([1.0])}, ANSWER, "folded", "wrong"),
        ({}, torch.tensor([1.1]), "folded", "wrong"),
    ],
)
def test_the_judge_tells_a_loss_from_an_error(
    changed: dict[str, torch.Tensor], answer: torch.Tensor, line: str, verdict: str
) -> None:
    cell = compared(BASE, Truth(WHOLE, ANSWER, exact=True), WHOLE | changed, answer, line)
    assert cell.verdict == verdict, cell


def test_what_peft_answers_in_use_is_right_where_its_own_merge_answers_otherwise() -> None:
    merged = Truth({"a.weight": torch.tensor([2.0, 2.0])}, torch.tensor([2.0]), exact=False, use=torch.tensor([1.5]))
    after, before = {"a.weight": torch.tensor([1.5, 2.0])}, {"a.weight": BASE["a.weight"]}
    assert compared(before, merged, after, torch.tensor([1.5]), "folded").verdict == "right"
    assert compared(before, merged, after, torch.tensor([1.7]), "folded").verdict == "wrong"


def test_the_page_has_a_mark_for_each_cell_and_a_reason_for_each_that_is_not_right() -> None:
    found = {
        "One": {"full": Cell("right"), "LoRA": Cell("refused", "/tmp/x/One/adapter-lora: adapts a|b")},
        "Two": {"full": Cell("silent loss", "b.weight as in the base"), "LoRA": Cell("unfit", "no layers")},
    }
    text = page.text(found)
    assert "| One | ✓ |" in text
    assert "| Two | **lost** |" in text
    assert "- **LoRA**, refused: One. adapter-lora: adapts a\\|b" in text
    assert "no layers" not in text
