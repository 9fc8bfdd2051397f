"""Exact kernels on tensors: reductions in float64 and the leading singular directions of a matrix by its Gram matrix.

Everything runs on the device of its inputs, in blocks of rows, so that what is needed beyond the inputs is bounded by the small side of the matrix.
Results do not depend on how many threads of this process compute at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements that are cast to float64 at a time."""
NULL = 1e-6
"""Singular values at or under this share of the largest are null directions."""


def dot(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩ summed in float64, whatever the shapes (equal) and dtypes."""
    x, y = x.reshape(-1), y.reshape(-1)
    parts = [torch.dot(x[i : i + CHUNK].double(), y[i : i + CHUNK].double()) for i in range(0, x.numel(), CHUNK)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def sum_squares(x: Tensor) -> float:
    """‖x‖² summed in float64."""
    return dot(x, x)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut `rows` rows of `columns` entries into blocks of about `CHUNK` entries, never under 64 rows."""
    step = max(64, CHUNK // max(columns, 1))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


class Leading(NamedTuple):
    """Right singular directions of a tall matrix: `sigma` (n, descending), `vectors` (n × k), float64; `rank` counts the directions not null."""

    sigma: Tensor
    vectors: Tensor
    rank: int


def right_singular(tall: Tensor) -> Leading:
    """σ and V of an m×n matrix, m ≥ n, by the eigenvectors of its float64 Gram matrix AᵀA.

    The Gram matrix squares the spectrum: a singular value is right to about ε(σ₁/σ)², relative. See `separated` for when that is not enough.
    """
    rows, columns = tall.shape
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=tall.device)
    for part in row_blocks(rows, columns):
        block = tall[part].double()
        gram.addmm_(block.T, block)
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.flip(0).clamp_(min=0.0).sqrt_()
    return Leading(sigma, vectors.flip(1), _rank(sigma))


def right_singular_svd(tall: Tensor) -> Leading:
    """The same by a full float64 SVD: slower and larger, and right where the Gram matrix is not."""
    _, sigma, vectors = torch.linalg.svd(tall.double(), full_matrices=False)
    return Leading(sigma, vectors.T.contiguous(), _rank(sigma))


def separated(sigma: Tensor, r: int) -> bool:
    """Whether the Gram route finds the span of the first `r` directions about as well as an SVD would.

    It is off by about nεσ₁²/(σ_r² − σ_{r+1}²), an SVD by nεσ₁/(σ_r − σ_{r+1}). Only where the first is over 1e-7 and a thousand times the second is
    there something to gain: a span without a gap is arbitrary by any route.
    """
    if not 0 < r < len(sigma):
        return True
    first, last, after = (float(sigma[i]) for i in (0, r - 1, r))
    gap = (last - after) * (last + after)
    error = len(sigma) * torch.finfo(torch.float64).eps * first * first
    return error <= 1e-7 * gap or first <= 1e3 * (last + after)


def _rank(sigma: Tensor) -> int:
    return int((sigma > NULL * sigma[0]).sum()) if len(sigma) and float(sigma[0]) > 0 else 0
