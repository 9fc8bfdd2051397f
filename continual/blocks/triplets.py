"""One model's singular triplets in one layer, from the two thin factors of its task vector; the m×n product is never
made."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from continual import linalg


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

    def first(self, count: int) -> Block:
        """Its first `count` triplets, or all of them where there are fewer."""
        return self._replace(u=self.u[:count], sigma=self.sigma[:count], v=self.v[:count])

    def dense(self) -> Tensor:
        """τ as an m×n matrix, float32."""
        return (self.u * self.sigma[:, None]).mT @ self.v


def triplets(left: Tensor, right: Tensor) -> Block:
    """The singular triplets of left·rightᵀ, an m×r and an n×r matrix of any float dtype.

    By QR of both and an SVD of the core in float64, O((m + n)r²), rounded once. Those at or below `linalg.NULL` of the
    largest are left out, and those that are zero in float32; of a product that is zero, or is so in float32, none is
    left, and `energy` is 0. Where a value is not finite, or the largest singular
    value is none in float32, there are no triplets either and `energy` is not finite.
    """
    m, n = len(left), len(right)
    a, b = left.double(), right.double()
    if not a.numel() or not b.numel():
        return _block(a.new_zeros(m, 0), a.new_zeros(0), b.new_zeros(n, 0), 0.0)
    if not bool(torch.isfinite(a.sum() + b.sum())):  # float32 values do not sum up to more than float64 holds
        return _block(a.new_zeros(m, 0), a.new_zeros(0), b.new_zeros(n, 0), math.nan)
    (basis_a, core_a), (basis_b, core_b) = torch.linalg.qr(a), torch.linalg.qr(b)
    w, sigma, zh = torch.linalg.svd(core_a @ core_b.mT, full_matrices=False)
    energy, top = float(sigma.square().sum()), float(sigma[0])
    if top > torch.finfo(torch.float32).max:
        return _block(a.new_zeros(m, 0), a.new_zeros(0), b.new_zeros(n, 0), math.inf)
    k = int(((sigma > linalg.NULL * top) & (sigma.float() > 0)).sum())
    if not k:
        energy = 0.0
    return _block(basis_a @ w[:, :k], sigma[:k], basis_b @ zh[:k].mT, energy)


def _block(u: Tensor, sigma: Tensor, v: Tensor, energy: float) -> Block:
    rows = (u.mT.float().contiguous(), sigma.float(), v.mT.float().contiguous())
    return Block(*rows, energy, len(sigma))
