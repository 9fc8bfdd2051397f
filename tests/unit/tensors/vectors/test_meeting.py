"""How rows of a task vector lie to those of a merge."""

from __future__ import annotations

import numpy as np
import pytest

from continual.tensors.vectors.meeting import LEADING, Meeting, meeting_of

RANDOM = np.random.default_rng(0)


def matrix(rank: int, noise: float = 0.0) -> np.ndarray:
    found = RANDOM.standard_normal((96, rank)) @ RANDOM.standard_normal((rank, 80))
    return (found + noise * RANDOM.standard_normal((96, 80))).astype(np.float32)


def test_what_lies_along_the_merge_and_what_does_not() -> None:
    merged = matrix(LEADING, 0.05)
    along = RANDOM.standard_normal((96, 96)).astype(np.float32) @ merged
    assert meeting_of(along, merged).overlap == pytest.approx(1.0, abs=0.05)
    v = np.linalg.svd(merged, full_matrices=False)[2][:LEADING]
    across = matrix(20)
    across -= across @ v.T @ v
    assert meeting_of(across, merged).overlap == pytest.approx(0.0, abs=0.01)
    other = RANDOM.standard_normal((96, 80)).astype(np.float32)
    exact = float(((other @ v.T) ** 2).sum() / (other**2).sum())
    assert meeting_of(other, merged).overlap == pytest.approx(exact, abs=0.01)


def test_signs() -> None:
    merged = matrix(80)
    assert meeting_of(merged, merged).conflict == pytest.approx(0.0, abs=1e-6)
    assert meeting_of(-merged, merged).conflict == pytest.approx(1.0)
    assert meeting_of(matrix(80), merged).conflict == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 3e38])
def test_of_nothing_nothing_is_said(value: float) -> None:
    odd = np.full((96, 80), value, np.float32)
    assert meeting_of(odd, matrix(3)) == meeting_of(matrix(3), odd) == Meeting()
