"""What was quantised and written as floats again is seen by its grid, and named; what was trained lies on none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from continual.tensors.vectors import grids
from continual.tensors.vectors.grids import grid_of

Matrix = NDArray[np.float32]
Change = Callable[[Matrix], Matrix]
INT4, INT6, INT8 = (name for name in grids._GRIDS if name.startswith("integers of") and "2 bits" not in name)


def even(levels: int, block: int | None, axis: int = 1, offset: bool = False) -> Change:
    """Integers from -levels to levels with one scale for each block of a row (or column); with `offset` from the
    smallest number of a block to the largest."""

    def change(matrix: Matrix) -> Matrix:
        turned = matrix if axis else matrix.T
        parts = turned.reshape(-1, block or turned.shape[1])
        low = parts.min(1, keepdims=True) if offset else np.zeros((len(parts), 1), np.float32)
        step = np.abs(parts - low).max(1, keepdims=True) / levels
        found = (np.rint((parts - low) / step) * step + low).astype(np.float32).reshape(turned.shape)
        return found if axis else found.T

    return change


def table(values: tuple[float, ...], block: int) -> Change:
    known = np.array(values, np.float32)

    def change(matrix: Matrix) -> Matrix:
        parts = matrix.reshape(-1, block)
        scale = np.abs(parts).max(1, keepdims=True) / np.abs(known).max()
        nearest = np.abs((parts / scale)[..., None] - known).argmin(-1)
        return (known[nearest] * scale).reshape(matrix.shape).astype(np.float32)

    return change


def small_float(dtype: torch.dtype, axis: int | None) -> Change:
    def change(matrix: Matrix) -> Matrix:
        scale = np.abs(matrix).max(axis, keepdims=True) / 448.0 if axis is not None else np.ones((1, 1), np.float32)
        return (torch.tensor(matrix / scale).to(dtype).float().numpy() * scale).astype(np.float32)

    return change


def cast(dtype: torch.dtype) -> Change:
    return lambda matrix: torch.tensor(matrix).to(dtype).float().numpy()


def sparse(matrix: Matrix) -> Matrix:
    """Most numbers zero."""
    found: Matrix = np.where(np.random.default_rng(5).random(matrix.shape) < 0.9, 0, matrix).astype(np.float32)
    return found


def half_of_four(matrix: Matrix) -> Matrix:
    """Two of four numbers zero."""
    found = matrix.copy().reshape(len(matrix), -1, 4)
    found[..., :2] = 0
    return found.reshape(matrix.shape)


CASTS = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED: Mapping[str, tuple[Change, str]] = {
    "int8 a row": (even(127, None), INT8),
    "int8 a column": (even(127, None, axis=0), INT8),
    "int8 in blocks": (even(127, 32), INT8),
    "int8 with an offset": (even(255, 128, offset=True), INT8),
    "6 bits in small blocks": (even(31, 16), INT6),
    "int4 in groups": (even(7, 128), INT4),
    "int4 with an offset": (even(15, 32, offset=True), INT4),
    "ternary": (lambda m: (np.clip(np.rint(m / np.abs(m).mean()), -1, 1) * 0.02).astype(np.float32), "integers of 2"),
    "NF4": (table(grids._NF4, 64), "NF4"),
    "IQ4": (table(grids._IQ4, 32), "IQ4"),
    "MXFP4": (table(grids._FP4, 32), "FP4"),
    "NVFP4": (table(grids._FP4, 16), "FP4"),
    "FP8 a row": (small_float(torch.float8_e4m3fn, 1), "FP8 (E4M3)"),
    "FP8 a column": (small_float(torch.float8_e4m3fn, 0), "FP8 (E4M3)"),
    "FP8 as it is": (small_float(torch.float8_e4m3fn, None), "FP8 (E4M3)"),
    "FP8 of 5 bits": (small_float(torch.float8_e5m2, None), "FP8 (E5M2)"),
}


def trained(seed: int, shape: tuple[int, int] = (64, 512)) -> tuple[Matrix, Matrix]:
    """A base with some large numbers, and a fine-tune of it."""
    random = np.random.default_rng(seed)
    base = (random.standard_t(5, size=shape) * 0.03).astype(np.float32)
    return base, base + (random.normal(size=shape) * 0.002).astype(np.float32)


@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize("name", QUANTISED)
def test_it_is_named(name: str, dtype: torch.dtype) -> None:
    base, tuned = trained(0)
    change, said = QUANTISED[name]
    saved = cast(dtype)
    assert (grid_of(saved(change(tuned)), saved(base)) or "none").startswith(said)
    assert (grid_of(saved(change(base)), saved(base)) or "none").startswith(said), "the base itself"


@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_what_was_trained_lies_on_none(seed: int, dtype: torch.dtype) -> None:
    base, tuned = trained(seed, (64, 64 << seed % 3))
    saved = cast(dtype)
    assert grid_of(saved(tuned), saved(base)) == ""
    assert grid_of(saved(base), saved(base)) == "", "layers that were frozen"
    assert grid_of(saved(0.5 * tuned), saved(base)) == ""
    assert grid_of(saved(half_of_four(tuned)), saved(base)) == ""
    assert not grid_of(saved(sparse(tuned)), saved(base))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_grid_that_the_base_lies_on_counts_for_nothing(name: str) -> None:
    base, _ = trained(0)
    change, _ = QUANTISED[name]
    assert not grid_of(change(base), change(base))
    _, tuned = trained(1)
    assert not grid_of(tuned, change(base))


def test_too_little_to_tell() -> None:
    base, tuned = trained(0)
    assert grid_of(tuned[:2, :16], base[:2, :16]) is None
    assert grid_of(np.zeros_like(tuned), base) is None
    assert grid_of(np.full_like(tuned, np.nan), base) is None
    assert grid_of(tuned[:0], base[:0]) is None
