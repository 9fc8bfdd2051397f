"""The rule that ops/docs/rules.md shows how to write is one: what the page says runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from continual import linalg
from continual.records import TensorSpec
from continual.rules import Folded, Inputs, ReadOptions, Row, Rule, sums


def test_the_rule_on_the_page_works() -> None:
    page = (Path(__file__).parents[3] / "ops/docs/rules.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {
        "linalg": linalg,
        "torch": torch,
        "Folded": Folded,
        "Rule": Rule,
        "Row": Row,
        "ReadOptions": ReadOptions,
        "sums": sums,
    }
    exec(code, names)
    row: Row = names["MINMIN"]
    made, spec = row.make({}), TensorSpec("w", (2, 2), "F32", "matrix")
    kept: dict[str, torch.Tensor] = {"sum": torch.zeros(2, 2)}
    totals: dict[str, float] = {}
    for tau in (torch.tensor([[1.0, -4.0], [0.5, 2.0]]), torch.tensor([[-3.0, 2.0], [0.1, -9.0]])):
        folded = made.fold(kept, tau, Inputs(spec), totals)
        kept, totals = folded.accumulators, made.settle(totals, folded.sums, 1.0)
    assert torch.equal(made.read(spec, kept, totals), torch.tensor([[1.0, 2.0], [0.1, 2.0]]))
    assert totals == pytest.approx({"count": 2, "weight": 2, "norm_sum": 21.25**0.5 + 94.01**0.5, "merged_sq": 9.01})
