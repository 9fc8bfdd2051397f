"""`ties` over pieces that stay in the cache against its form for short tensors and accelerators."""

from __future__ import annotations

import pytest
import torch

from continual import linalg
from continual.rules import ties
from continual.rules.contract import Folded


def folds(numel: int) -> tuple[dict[str, torch.Tensor], list[Folded]]:
    """Three models, and the second taken out again."""
    random = torch.Generator().manual_seed(numel)
    taus = [torch.randn(numel, generator=random) for _ in range(3)]
    kept = {slot: torch.zeros(numel) for slot in (ties.PLUS, ties.MINUS)}
    kept |= {slot: torch.zeros(numel, dtype=torch.uint16) for slot in (ties.COUNT_PLUS, ties.COUNT_MINUS)}
    steps = [*((tau, 1.0) for tau in taus), (taus[1], -1.0)]
    return kept, [ties.add_sides(kept, tau, 0.8, weight) for tau, weight in steps]


def test_long_tensors_go_by_pieces_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    numel = linalg.PIECE + 1500
    by_pieces, found = folds(numel)
    monkeypatch.setattr(linalg, "SMALL", numel)
    at_once, expected = folds(numel)
    assert all(torch.equal(by_pieces[slot], at_once[slot]) for slot in at_once)
    for one, other in zip(found, expected, strict=True):
        assert one.sums[:3] == pytest.approx(other.sums[:3], rel=1e-6, abs=1e-3)
