"""OPCM without one of its models: the models after it are folded again, on what was there before it. What explaining a
merge asks for each model and layer.

Where all triplets are in bases that grow model by model, what is folded so far has nothing beyond its own corner, so
each step works on a matrix as small as it may be. `without` does the rule's own steps, one after the other. Where a
model is only freed of leading subspaces, `projected` does those of all models that are left out at once, in float64:
with the projectors P and Q on these subspaces, and a thin τ = UVᵀ, what is folded is thin too, of U, V, PU and QV. So a
step costs the decomposition of RᵀR or of RRᵀ, and little else; and the first step after the model that is left out asks
for the same subspaces as that model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from continual import linalg
from continual.lazily import Tensor, torch
from continual.rules.apart import Apart, LeftOut, Without

Fold = Callable[[Tensor, Tensor], Tensor]
"""R after a fold: of R and τ, both m×n float32; may overwrite both."""
Cut = Callable[[Tensor], int]
"""How many singular values lead, of all of them, descending, null ones 0."""
Freed = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]
"""What is folded of a task vector UVᵀ, as products that are added up: of U and V, and of PU and QV."""


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


class _Leading(NamedTuple):
    """The leading singular subspaces of M matrices, M×m×n (`sums`). `vectors`: all singular vectors of the smaller
    side, M×k×k; `held`: 1 for those that lead, else 0, and `inverse`: 1/σ² of these, M×k."""

    sums: Tensor
    vectors: Tensor
    held: Tensor
    inverse: Tensor

    def images(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """PU and QV, M×m×k and M×n×k, of U and V with as many rows or more."""
        _, m, n = self.sums.shape
        tall = m >= n
        # of R with σ and V: PU = RV(σ⁻²)VᵀRᵀU and QV₀ = VVᵀV₀ over what leads
        sums, u, v = (self.sums, u[:m], v[:n]) if tall else (self.sums.mT, v[:n], u[:m])
        inner = self.vectors.mT @ torch.cat([sums.mT @ u, v.expand(len(sums), -1, -1)], 2)
        k = u.shape[1]
        inner[..., :k] *= self.inverse[..., None]
        inner[..., k:] *= self.held[..., None]
        found = self.vectors @ inner
        one, other = sums @ found[..., :k], found[..., k:]
        return (one, other) if tall else (other, one)


def projected(given: Apart, cut: Cut, freed: Freed) -> LeftOut:
    """The same. `freed` says what is left of a task vector."""
    return _left_out(given, _folded(given, cut, freed, alone=False))


def whole(given: Apart, cut: Cut, freed: Freed) -> Tensor:
    """R alone."""
    return _widened(_folded(given, cut, freed, alone=True)[0], (len(given.u), len(given.v)))


def _folded(given: Apart, cut: Cut, freed: Freed, *, alone: bool) -> Tensor:
    """R, and unless it is wanted `alone`, R without each of the models that touched the tensor; in the last corner."""
    corners = _corners(given)
    sums, base = given.u.new_zeros(1, 0, 0), None
    for index in sorted(given.rows):
        where = given.rows[index]
        m, n = corners[index]
        u, v = given.u[:m, where] * given.sigma[where], given.v[:n, where]
        leading = _leading(sums if base is None or alone else sums[:-1], cut)
        images = [leading.images(u, v)]
        if base is not None and not alone:  # the last one is R as it was before the model before this one
            images.append(base.images(u, v))
        after = sums.new_zeros(len(sums) + (not alone), m, n)
        before = after[:, : sums.shape[1], : sums.shape[2]]
        before[: len(sums)] = sums
        begin = 0
        for one, other in images:
            part = after[begin : begin + len(one)]
            for left, right in freed((u, v), (one, other)):
                part[:, : left.shape[-2], : right.shape[-2]] += left @ right.mT
            begin += len(one)
        if not alone:
            before[-1] = sums[0]
        base, sums = _Leading(*(part[:1] for part in leading)), after
    return sums


def _left_out(given: Apart, sums: Tensor) -> LeftOut:
    """What follows from R, and R without each of the models that touched the tensor."""
    whole = _widened(sums[0], (len(given.u), len(given.v)))
    squares, inners = sums.square().sum((1, 2)).tolist(), (sums * sums[0]).sum((1, 2)).tolist()
    rests = [Without(squares[0], squares[0])] * len(given.weights)
    for place, index in enumerate(sorted(given.rows), 1):
        rests[index] = Without(squares[place], inners[place])
    return LeftOut(whole, rests)


def _leading(sums: Tensor, cut: Cut) -> _Leading:
    count, m, n = sums.shape
    if not m or not n:
        return _Leading(sums, *(sums.new_zeros(count, 0, *more) for more in ((0,), (), ())))
    values, vectors = torch.linalg.eigh(sums.mT @ sums if m >= n else sums @ sums.mT)
    sigma = values.clamp(min=0).sqrt()
    sigma = torch.where(sigma > linalg.NULL * sigma[:, -1:], sigma, 0.0)
    held = torch.zeros_like(sigma)
    for place, one in enumerate(sigma.flip(1).cpu()):
        held[place, len(one) - cut(one) :] = 1.0
    return _Leading(sums, vectors, held, torch.where(held > 0, 1.0 / values, 0.0))


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
