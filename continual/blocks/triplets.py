"""One model's singular triplets in one layer: from the two thin factors of its task vector, whose m×n product is never
made, or from the m×n matrix where it is no such product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from continual import linalg
from continual.lazily import Tensor, torch

_SMALL = 1024
"""Sides up to which all triplets of a matrix are found, however few are kept."""
_TINY = 2.0**-150
"""What is not larger than this is zero in float32."""
_SAFE = 1e3
"""Up to this condition of its columns, a basis by Cholesky is orthonormal to 1e-10."""
_NOISE = 1e-14
"""Up to this fraction of the lengths that its columns may have, multiplied and summed up, a product is what rounding in
float64 leaves of one that is zero."""
_STEPS = 2
"""Steps of the subspace iteration. What is cut off of task vectors of DoRA is within a twentieth of the least possible.
"""


class Block(NamedTuple):
    """What one model is in one layer: τ = uᵀ·diag(sigma)·v, as it lies on disk.

    `u`: k×m float32, its rows are left singular vectors. `sigma`: k, float32, descending. `v`: k×n float32. `energy`:
    ‖τ‖² before anything was cut off, not finite where τ is not. `rank`: how many triplets there were before that.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor
    energy: float
    rank: int

    @property
    def kept(self) -> float:
        """‖τ‖² of what is kept."""
        return float(self.sigma.double().square().sum())

    @property
    def cut(self) -> float:
        """‖τ‖² of what was cut off; 0 where all triplets are there."""
        return max(0.0, self.energy - self.kept) if len(self.sigma) < self.rank else 0.0

    def first(self, count: int) -> Block:
        """Its first `count` triplets, or all of them where there are fewer."""
        return self._replace(u=self.u[:count], sigma=self.sigma[:count], v=self.v[:count])

    def dense(self) -> Tensor:
        """τ as an m×n matrix, float32."""
        return (self.u * self.sigma[:, None]).mT @ self.v


def triplets(left: Tensor, right: Tensor) -> Block:
    """The singular triplets of left·rightᵀ, an m×r and an n×r matrix of any float dtype.

    By an orthonormal basis of both and an SVD of the core in float64, O((m + n)r²), rounded once. Those at or below
    `linalg.NULL` of the largest are left out, and those that are zero in float32; of a product that is zero, or is so
    in float32, none is left, and `energy` is 0: also of one whose columns cancel out, as those of an adapter that was
    subtracted from itself. Where a value is not finite, or the largest singular value is none in float32, there are no
    triplets either and `energy` is not finite.
    """
    m, n = len(left), len(right)
    a, b = left.double(), right.double()
    if not a.numel() or not b.numel():
        return _nothing(a, m, n, 0.0)
    bases, noise = _by_cholesky(a, b), 0.0
    if bases is None:
        if not bool(torch.isfinite(a.sum() + b.sum())):  # float32 values do not sum up to more than float64 holds
            return _nothing(a, m, n, math.nan)
        bases = _by_qr(a), _by_qr(b)
        # columns far from dependent, as above, cannot cancel out; no squares, which float64 could not hold
        noise = _NOISE * math.sqrt(m * n) * float((a.abs().amax(0) * b.abs().amax(0)).sum())
    (core_a, basis_a), (core_b, basis_b) = bases
    core = core_a @ core_b.mT
    try:
        w, sigma, zh = torch.linalg.svd(core, full_matrices=False)
    except RuntimeError:  # LinAlgError is one
        if bool(torch.isfinite(core).all()):
            raise
        return _nothing(a, m, n, math.inf)  # of factors in float64
    values = sigma.tolist()
    if not values[0] <= torch.finfo(torch.float32).max:  # NaN compares false
        return _nothing(a, m, n, math.inf)
    least = max(linalg.NULL * values[0], noise, _TINY)
    k = sum(value > least for value in values)
    energy = math.fsum(value * value for value in values) if k else 0.0
    return _block(basis_a(w[:, :k].mT), sigma[:k], basis_b(zh[:k]), energy)


_Basis = tuple[Tensor, Callable[[Tensor], Tensor]]
"""Of a factor F = Q·R: R, and what gives k×len(F) products with the transposed of the orthonormal Q."""


def _by_qr(factor: Tensor) -> _Basis:
    basis, core = torch.linalg.qr(factor)
    return core, lambda turned: turned @ basis.mT


def _by_cholesky(a: Tensor, b: Tensor) -> tuple[_Basis, _Basis] | None:
    """Bases of two factors with as many columns, from their Grams, whose columns are made unit vectors first: half the
    work of QR. None where that could be wrong by more than 1e-10, as where columns are zero or nearly depend on others,
    or a value is not finite."""
    grams = torch.stack([a.mT @ a, b.mT @ b])
    lengths = grams.diagonal(dim1=1, dim2=2).sqrt()
    factors, failed = torch.linalg.cholesky_ex(grams / (lengths[:, :, None] * lengths[:, None]))
    unit = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    inverse = torch.linalg.solve_triangular(factors, unit, upper=False)
    # a unit diagonal makes ‖factor‖ = √size; NaN compares false
    if not float(inverse.norm()) * len(unit) ** 0.5 < _SAFE or bool(failed.any()):
        return None
    cores, turns = factors.mT * lengths[:, None], inverse / lengths[:, None]

    def of(number: int, factor: Tensor) -> _Basis:
        return cores[number], lambda turned: (turned @ turns[number]) @ factor.mT

    return of(0, a), of(1, b)


def _block(u: Tensor, sigma: Tensor, v: Tensor, energy: float) -> Block:
    """Triplets as they lie on disk, from k×m and k×n float64: products made in this order are not transposed after."""
    return Block(u.float().contiguous(), sigma.float(), v.float().contiguous(), energy, len(sigma))


def _nothing(like: Tensor, m: int, n: int, energy: float) -> Block:
    """No triplets of an m×n matrix, where `like` is."""
    return _block(like.new_zeros(0, m), like.new_zeros(0), like.new_zeros(0, n), energy)


def decomposed(matrix: Tensor, most: int) -> Block:
    """The largest `most` singular triplets of an m×n matrix, float32, or all of them where there are fewer.

    Rows and columns of zeros are left aside. Where few others are left, all triplets come from the float64 Gram
    (`linalg.right_singular`); else the largest from a range finder with two steps of a subspace iteration (Halko,
    Martinsson and Tropp 2011, algorithm 4.4), which finds all of a matrix of lower rank. `energy` is ‖matrix‖² in
    either case, so that what was cut off is known exactly. `rank`: how many there are; where `most` do not say all, the
    smaller side. Of a matrix that is zero or not finite there is none, as `triplets` has it.
    """
    m, n = matrix.shape
    energy = linalg.dot(matrix, matrix)
    rows, columns = (matrix != 0).any(1).nonzero()[:, 0], (matrix != 0).any(0).nonzero()[:, 0]
    nothing = _nothing(matrix, m, n, energy)
    if not energy or not math.isfinite(energy):
        return nothing
    held = matrix if (len(rows), len(columns)) == (m, n) else matrix[rows][:, columns]
    found = _all_of(held) if _few(len(rows), len(columns), most) else _largest_of(held, most, energy)
    if not bool(torch.isfinite(found.sigma).all()):
        return nothing._replace(energy=math.inf)
    if not bool(found.sigma[0] > 0):
        return nothing._replace(energy=0.0)
    u, v = matrix.new_zeros(len(found.u), m), matrix.new_zeros(len(found.v), n)
    u[:, rows], v[:, columns] = found.u, found.v
    return Block(u, found.sigma, v, energy, found.rank).first(most)


def decomposing(m: int, n: int, most: int) -> int:
    """Peak bytes of `decomposed`, without the matrix that it is given."""
    small = min(m, n)
    if _few(m, n, most):
        return 4 * m * n + linalg.workspace(m, n) + 12 * small * (m + n)
    return 4 * m * n + 8 * 5 * (most + linalg.SPARE) * (m + n) + 8 * 2 * linalg.BLOCK


def _few(m: int, n: int, most: int) -> bool:
    """Whether the Gram of the smaller side costs no more than a range finder."""
    return min(m, n) <= max(_SMALL, 2 * (most + linalg.SPARE))


def _all_of(matrix: Tensor) -> Block:
    """Every triplet, from the Gram of the smaller side."""
    m, n = matrix.shape
    rows = linalg.tall(matrix)
    sigma, v = linalg.right_singular(rows, linalg.NULL)
    v = v[:, : int((sigma > 0).sum())]
    u = torch.cat([rows[part].double() @ v for part in linalg.row_blocks(*rows.shape)])
    sigma = u.norm(dim=0)
    order = sigma.argsort(descending=True)
    u, sigma, v = (u / sigma)[:, order], sigma[order], v[:, order]
    left, right = (u, v) if m >= n else (v, u)
    return _block(left.mT, sigma, right.mT, 0.0)


def _largest_of(matrix: Tensor, most: int, energy: float) -> Block:
    """The largest `most` triplets of a matrix of this energy, by a range finder."""
    m, n = matrix.shape
    found = linalg.span(matrix, most)
    if found is not None:
        basis, core = found
    else:
        draw = torch.Generator().manual_seed(most)
        start = torch.randn(n, most + linalg.SPARE, generator=draw, dtype=torch.float64).to(matrix.device)
        parts = linalg.row_blocks(m, n)
        basis = torch.linalg.qr(torch.cat([matrix[part].double() @ start for part in parts]))[0]
        for _ in range(_STEPS):
            other = torch.linalg.qr(_turned(matrix, basis, parts))[0]
            basis = torch.linalg.qr(torch.cat([matrix[part].double() @ other for part in parts]))[0]
        core = _turned(matrix, basis, parts).mT
    turned, upper = torch.linalg.qr(core.mT)
    w, sigma, zh = torch.linalg.svd(upper.mT, full_matrices=False)
    k = int((sigma > linalg.NULL * sigma[0]).sum())
    block = _block(w[:, :k].mT @ basis.mT, sigma[:k], zh[:k] @ turned.mT, energy)
    return block if found is not None else block._replace(rank=min(m, n))


def _turned(matrix: Tensor, basis: Tensor, parts: Sequence[slice]) -> Tensor:
    """matrixᵀ·basis, float64."""
    found = basis.new_zeros(matrix.shape[1], basis.shape[1])
    for part in parts:
        found.addmm_(matrix[part].double().mT, basis[part])
    return found
