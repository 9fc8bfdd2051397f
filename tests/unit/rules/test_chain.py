"""Transforms before a rule: what a chain of them needs and allows. What it computes is in tests/property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from continual.records import TensorSpec, Totals
from continual.rules import Inputs, Pass, rule
from continual.rules.before import TRANSFORMS, random_words

PLAIN = TensorSpec("w", (100,), "F32", "plain")


def test_a_chain_measures_as_often_as_its_parts_together() -> None:
    usual = [
        made.needs.measure.usual if made.needs.measure else 0.0
        for made in (
            rule("mean"),
            rule("mean", {"before": ["trim"]}),
            rule("ties"),
            rule("ties", {"before": ["trim", "drop"]}),
        )
    ]
    assert usual == [0.0, 1.0625, 1.0625, 2.125]


@pytest.mark.parametrize(
    ("before", "runs"), [(["drop"], True), (["trim"], True), (["breadcrumbs"], False), (["trim:over=tensor"], False)]
)
def test_a_chain_takes_runs_unless_a_transform_needs_whole_tensors(before: list[str], runs: bool) -> None:
    made, alone = rule("mean", {"before": before}), rule("mean")
    assert made.fold.elementwise(PLAIN) is runs
    assert made.fold.workspace(PLAIN) == alone.fold.workspace(PLAIN) + (0 if runs else 2400)
    matrix = TensorSpec("w", (10, 10), "F32", "matrix")
    assert not rule("iso-c", {"before": before}).fold.elementwise(matrix), "the rule itself needs it whole"


def test_only_what_draws_needs_a_seed() -> None:
    assert [rule("mean", {"before": before}).needs.seeded for before in (["trim"], ["drop"], ["trim", "drop"])] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_seen(name: str, value: float) -> None:
    made = rule("task-arithmetic", {"before": [name]})
    tau = torch.linspace(-1.0, 1.0, 100)
    tau[3] = value
    found: object = made.needs.measure
    while isinstance(found, Pass):
        counts = np.zeros(found.bins, np.int64)
        found.tally(tau.clone(), Inputs(PLAIN), counts, 1)
        found = found.conclude(counts, 100)
    folded = made.fold.apply({"sum": torch.zeros(100)}, tau, Inputs(PLAIN, measured=found), Totals())
    assert not math.isfinite(folded.sums.tau_sq)


@pytest.mark.parametrize(("start", "count"), [(0, 5), (7, 1), (8, 3), (1, 30), (1000, 17)])
def test_random_words_from_anywhere_are_those_of_the_whole_stream(start: int, count: int) -> None:
    whole = random_words("seed", 0, 1100)
    assert random_words("seed", start, count).tolist() == whole[start : start + count].tolist()
    assert random_words("other", 0, 50).tolist() != whole[:50].tolist()


def test_drop_keeps_the_share_that_it_says() -> None:
    tau = torch.ones(100_000)
    transform = TRANSFORMS["drop"].transform({"rate": 0.9})
    kept = transform.apply(tau, Inputs(TensorSpec("w", (100_000,), "F32", "plain"), seed=5))
    assert float((kept != 0).float().mean()) == pytest.approx(0.1, abs=0.005)
    assert float(kept.max()) == pytest.approx(10.0)
