"""OPCM without one of its models: the models after it are folded again, on what was there before it. What explaining a
merge asks for each model and layer.

Each step is the rule's own, on a matrix as small as it may be: with all triplets in bases that grow model by model,
what was folded so far has nothing beyond its own corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from continual.rules.contract import Apart, LeftOut, Without

Fold = Callable[[Tensor, Tensor], Tensor]
"""R after a fold: of R and τ, both m×n float32; may overwrite both."""


def without(given: Apart, fold: Fold) -> LeftOut:
    """R, and of R without each model the square of its length, and its inner product with R."""
    count = len(given.weights)
    corners = _corners(given)

    def folded(total: Tensor, indices: Sequence[int]) -> Tensor:
        for index in indices:
            if index in given.rows:
                total = _step(given, total, index, corners[index], fold)
        return total

    before = [given.u.new_zeros(0, 0, dtype=torch.float32)]
    for index in range(count):
        before.append(folded(before[-1].clone(), [index]))
    whole = _widened(before[-1], (len(given.u), len(given.v))).double()
    square, rests = float(whole.square().sum()), list[Without]()
    for index in range(count):
        if index not in given.rows:
            rests.append(Without(square, square))
            continue
        rest = folded(before[index].clone(), range(index + 1, count)).double()
        m, n = rest.shape
        rests.append(Without(float(rest.square().sum()), float((rest * whole[:m, :n]).sum())))
    return LeftOut(whole, rests)


def _step(given: Apart, total: Tensor, index: int, corner: tuple[int, int], fold: Fold) -> Tensor:
    m, n = corner
    where = given.rows[index]
    tau = ((given.u[:m, where] * given.sigma[where]) @ given.v[:n, where].mT).float()
    return fold(_widened(total, corner), tau)


def _widened(total: Tensor, corner: tuple[int, int]) -> Tensor:
    """A matrix with zeros below and to the right; contiguous."""
    if tuple(total.shape) == corner:
        return total
    found = total.new_zeros(corner)
    found[: total.shape[0], : total.shape[1]] = total
    return found


def _corners(given: Apart) -> dict[int, tuple[int, int]]:
    """How many rows and columns the triplets of all models up to each of them reach."""
    found, reach = {}, [0, 0]
    for index in sorted(given.rows):
        where = given.rows[index]
        for side, columns in enumerate((given.u[:, where], given.v[:, where])):
            held = columns.ne(0).any(1).nonzero()
            reach[side] = max(reach[side], int(held[-1]) + 1 if len(held) else 0)
        found[index] = (reach[0], reach[1])
    return found
