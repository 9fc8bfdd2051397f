"""Fine-tunes that were made unmergeable, by their figures and as models that are folded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import continual
from continual.errors import Refuse
from continual.gates.contract import Numbers
from continual.gates.unmergeable import UnmergeableGate
from continual.records import Totals
from continual.tensors.names.pairings import PairKind
from continual.tensors.vectors.products import HeadElsewhere, HeadFigures
from tests.helpers import models
from tests.unit.gates.cases import Case

Weights = dict[str, torch.Tensor]
HEADS, SIZE, WIDTH, INNER = 4, 8, 32, 80


def numbers(
    apart: list[float],
    moved: list[float],
    alike: list[float] | None = None,
    *elsewhere: HeadElsewhere,
    kind: PairKind = "query-key",
) -> Numbers:
    likes = np.array(alike or [1.0] * len(apart))
    pair = HeadFigures("layers.3", kind, np.array(apart), np.array(moved), likes, elsewhere)
    return Numbers("alice", 1.0, 10.0, Totals(), paired=lambda: [pair])


SWAPPED = numbers([1.4, 1.4], [1.4, 1.4], [0.0, 0.1], HeadElsewhere(0, 1, 0.99), HeadElsewhere(1, 0, 0.98))
REFUSED = {
    "locked": lambda _place: Case(UnmergeableGate(), numbers([0.5, 0.02], [0.2, 0.01])),
    "permuted": lambda _place: Case(UnmergeableGate(), SWAPPED),
}


@pytest.mark.parametrize(
    "seen",
    [
        numbers([0.5, 0.5], [0.4, 0.9]),
        numbers([0.09, 0.09], [0.0, 0.0]),  # no lock that harms
        numbers([0.5] + [0.5] * 9, [0.2] + [0.9] * 9),  # one of ten
        numbers(
            [1.4, 1.4], [1.4, 1.4], [0.0, 0.1], HeadElsewhere(0, 1, 0.3), HeadElsewhere(1, 0, 0.2)
        ),  # of another base
        numbers(
            [1.4, 1.4], [1.4, 1.4], [0.0, 0.1], HeadElsewhere(0, 0, 0.9), HeadElsewhere(1, 1, 0.9)
        ),  # in their place
    ],
)
def test_let_in(seen: Numbers) -> None:
    UnmergeableGate().judge(seen)


def test_heads_in_another_order_are_named_so_though_they_are_alike_enough_to_look_locked() -> None:
    with pytest.raises(Refuse) as raised:
        UnmergeableGate().judge(
            numbers([1.3, 1.2], [0.6, 0.7], [0.0, 0.1], HeadElsewhere(0, 1, 0.99), HeadElsewhere(1, 0, 0.98))
        )
    assert raised.value.reason == "permuted"


def test_what_is_off_reads_nothing() -> None:
    UnmergeableGate(act="off").judge(Numbers("alice", 1.0, 10.0, Totals(), paired=pytest.fail))


def test_the_settings_say_where_the_line_is() -> None:
    with pytest.raises(Refuse):
        UnmergeableGate(ratio=1.1).judge(numbers([0.5, 0.5], [0.4, 0.9]))
    with pytest.raises(Refuse):
        UnmergeableGate(share=0.05).judge(numbers([0.5] * 10, [0.2] + [0.9] * 9))
    UnmergeableGate(elsewhere=0.995).judge(SWAPPED)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of one layer with grouped queries: four heads, two of keys and values."""
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (HEADS * SIZE, WIDTH),
        "model.layers.0.self_attn.k_proj.weight": (HEADS * SIZE // 2, WIDTH),
        "model.layers.0.self_attn.v_proj.weight": (HEADS * SIZE // 2, WIDTH),
        "model.layers.0.self_attn.o_proj.weight": (WIDTH, HEADS * SIZE),
        "model.layers.0.mlp.up_proj.weight": (INNER, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, INNER),
    }
    found = models.base(tmp_path / "base", shapes=shapes)
    config = {**models.CONFIG, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    (found / "config.json").write_text(json.dumps(config))
    return found


def locked(weights: Weights) -> None:
    """A matrix for each head of keys, and its inverse for the queries that share it."""
    random = torch.Generator().manual_seed(3)
    between = [torch.eye(SIZE) + torch.randn(SIZE, SIZE, generator=random) / 4 for _ in range(HEADS // 2)]
    back = torch.block_diag(*(torch.linalg.inv(one).T for one in between for _ in range(2)))
    head = "model.layers.0.self_attn"
    weights[f"{head}.k_proj.weight"] = torch.block_diag(*between) @ weights[f"{head}.k_proj.weight"]
    weights[f"{head}.q_proj.weight"] = back @ weights[f"{head}.q_proj.weight"]


def swapped(weights: Weights) -> None:
    """The second half of the heads first."""
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        weights[name] = weights[name].roll(len(weights[name]) // 2, 0)
    weights["model.layers.0.self_attn.o_proj.weight"] = weights["model.layers.0.self_attn.o_proj.weight"].roll(16, 1)


def shuffled(weights: Weights) -> None:
    """The channels in another order, and of another size."""
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(4))
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    weights[up], weights[down] = 2.0 * weights[up][order], 0.5 * weights[down][:, order]


def shrunk(weights: Weights) -> None:
    """All weights shorter, as long training with weight decay makes them."""
    for name in weights:
        weights[name] *= 0.7


def half(weights: Weights) -> None:
    """Saved in half precision."""
    for name in weights:
        weights[name] = weights[name].bfloat16()


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (locked, "locked", "queries and keys of model.layers.0.self_attn, 4 of 4 heads moved"),
        (swapped, "permuted", "the heads of model.layers.0.self_attn are permuted against the base's"),
        (shuffled, "permuted", "the channels of model.layers.0.mlp are permuted against the base's"),
        (shrunk, None, ""),
        (half, None, ""),
        (None, None, ""),
    ],
)
def test_models(base: Path, change: Callable[[Weights], None] | None, reason: str | None, said: str) -> None:
    model = models.fine_tune(base, base.parent / "alice", 1, size=0.2, change=change)
    continual.init(base, base.parent / "state")
    with continual.open(base.parent / "state", write=True, workers=1) as merge:
        outcome = merge.fold(model)
    assert (outcome.reason, said in outcome.message) == (reason, True), outcome.message


def test_one_that_moved_very_far_is_let_in(base: Path) -> None:
    model = models.fine_tune(base, base.parent / "alice", 1, size=0.5)
    continual.init(base, base.parent / "state")
    with continual.open(base.parent / "state", write=True, workers=1) as merge:
        assert merge.fold(model).fate == "folded"
