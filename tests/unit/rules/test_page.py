"""The page on rules, ops/docs/rules.md: the rule that it shows how to write is one, and every rule, option and
transform has its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from continual.records import TensorSpec, Totals
from continual.rules import ROWS, TRANSFORMS, Inputs, NoOptions, RuleRow, settle

PAGE = (Path(__file__).parents[3] / "ops/docs/rules.md").read_text()


def test_the_rule_on_the_page_works() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, RuleRow[NoOptions]] = {}
    exec(code, names)
    row = names["MINMIN"]
    made, spec = row.rule(), TensorSpec("w", (2, 2), "F32", "matrix")
    kept = {slot: torch.zeros(found.shape) for slot, found in made.slots(spec).items()}
    totals = Totals()
    for tau in (torch.tensor([[1.0, -4.0], [0.5, 2.0]]), torch.tensor([[-3.0, 2.0], [0.1, -9.0]])):
        folded = made.fold.apply(kept, tau, Inputs(spec), totals)
        kept, totals = folded.accumulators, settle(totals, folded.sums, 1.0)
    assert torch.equal(made.read.unit(spec, kept, totals), torch.tensor([[1.0, 2.0], [0.1, 2.0]]))
    assert totals.body() == pytest.approx(
        {"count": 2, "weight": 2, "norm_sum": 21.25**0.5 + 94.01**0.5, "merged_sq": 9.01}
    )


@pytest.mark.parametrize("row", [*ROWS.values(), *TRANSFORMS.values()], ids=lambda row: row.name)
def test_every_rule_and_transform_is_on_the_page_with_its_options(row: RuleRow[NoOptions]) -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith(f"| `{row.name}`")]
    assert lines, f"{row.name} has no line in a table of ops/docs/rules.md"
    missing = [name for name in row.declared if f"`{name}`" not in lines[0]]
    assert missing == [], f"ops/docs/rules.md does not name these options of {row.name}"
