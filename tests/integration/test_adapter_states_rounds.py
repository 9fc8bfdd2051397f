"""Rounds over adapters that wait, on states that keep adapters as they are: what is chosen is what a state of whole
tensors chooses of the same adapters, by the factors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from continual import api, making
from continual.errors import Misconfigured
from continual.state.verify import verify
from tests.helpers import packing, quadratic
from tests.helpers.pools import fill, names, opened, waits

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


def state_of(tmp_path: Path, base: Path, width: int | None, rule: str) -> Path:
    state = tmp_path / ("dense" if width is None else "blocks")
    making.init(base, state, making.Recipe(rule=rule, width=width))
    return state


def candidates(base: Path) -> list[Path]:
    """Three that are good for a task each, and two of noise."""
    good = [quadratic.lora(base, k, f"good{k}", seed=k) for k in range(3)]
    noise = [quadratic.lora(base, None, f"noise{k}", seed=50 + k) for k in range(2)]
    return [noise[0], *good, noise[1]]


def read(merge: api.Merge) -> dict[str, torch.Tensor]:
    reading = merge.reading()
    reading.settle(merge.executor, lambda *_: None)
    return {spec.name: reading.vector(spec) for spec in merge.state.format.tensors}


def same_table(ours: Any, theirs: Any) -> None:
    """Two rounds found the same of the same members, up to rounding."""
    assert [(row.name, row.fate, row.reason) for row in ours.rows] == [
        (row.name, row.fate, row.reason) for row in theirs.rows
    ]
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        for figure in ("score", "change", "error", "z", "weight"):
            found, expected = getattr(one, figure), getattr(other, figure)
            assert (found is None) == (expected is None), (one, figure)
            assert found is None or found == pytest.approx(expected, rel=1e-3, abs=1e-4), (one, figure)
    assert (ours.loss, ours.before) == pytest.approx((theirs.loss, theirs.before), rel=1e-4)


def test_the_relevant_ones_are_those_of_a_dense_state(tmp_path: Path, base: Path) -> None:
    paths, late = candidates(base), quadratic.lora(base, 1, "late", seed=7, share=0.5)
    found: dict[int | None, list[Any]] = {}
    for width in (None, 64):
        with opened(state_of(tmp_path, base, width, "iso-c"), base) as merge:
            fill(merge, *paths)
            looked = merge.look_round()
            assert looked.commit is None
            first = merge.round()
            assert sorted(names(merge)) == ["good0", "good1", "good2"]
            assert waits(merge) == ["noise0", "noise1"]
            fill(merge, late)
            second = merge.round()
            assert merge.state.ledger.open_round is None
            assert verify(merge.state) == []
            assert merge.why("noise0").rounds[-1].row.name == "noise0"
            told = [fold.entry.numbers.relevance for fold in merge.state.ledger.folds()]
            assert all(one is not None for one in told)
            found[width] = [looked, first, second, names(merge), waits(merge), read(merge)]
    dense, blocks = found[None], found[64]
    for one, other in zip(blocks[:3], dense[:3], strict=True):
        same_table(one, other)
    assert blocks[3:5] == dense[3:5]
    for name, value in dense[5].items():
        torch.testing.assert_close(blocks[5][name], value, rtol=0, atol=1e-5 * float(value.abs().max() + 1e-3))


def test_the_base_has_to_be_readable(tmp_path: Path, base: Path) -> None:
    """A packed one is not; what it was packed from is. One that is gone is said before anything is read."""
    packed, state, good = packing.packed(base, tmp_path / "packed", "gptq"), tmp_path / "state", candidates(base)[1]
    making.init(packed, state, making.Recipe(rule="mean", width=64))
    with opened(state, base) as merge:
        fill(merge, good)
        for run in (merge.round, merge.look_round, lambda: merge.check([])):
            with pytest.raises(
                Misconfigured, match=r"is quantised \(GPTQ\).*model that it was quantised from: base = DIR"
            ):
                run()
        assert merge.state.ledger.open_round is None
    asked = {"objective": "tests.helpers.quadratic:make", "select": "relevance", "base": base}
    with api.open(state, write=True, **asked) as merge:
        assert merge.round().folds == 1
    whole = tmp_path / "whole"
    making.init(base, whole, making.Recipe(rule="mean", width=64))
    with opened(whole, base) as merge:
        fill(merge, good)
        (base / "model.safetensors").rename(tmp_path / "gone")
        with pytest.raises(Misconfigured, match=r"has no model.safetensors any more, and a round takes gradients"):
            merge.round()
