"""How the first rows of a matrix's task vector lie to those of the merge before it: how much of it is along what the
merge has most of, and how much of it has the other sign."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEADING = 4
"""Directions of the merge that count as what it has most of."""
ELEMENTS = 1 << 17
"""Elements that are looked at."""
_STEPS = 3

Single = NDArray[np.float32]


class Meeting(NamedTuple):
    """`overlap`: the share of ‖τ‖² that lies along the leading right singular directions of the merge's rows.
    `conflict`: the share of Σ|τ| at elements where the merge has the other sign: about a half of what is independent of
    it. None of what is zero."""

    overlap: float | None = None
    conflict: float | None = None


def meeting_of(tau: Single, merged: Single) -> Meeting:
    """Of two matrices of one shape."""
    square, found = float(np.vdot(tau, tau)), float(np.vdot(merged, merged))
    if not (0.0 < square < np.inf and 0.0 < found < np.inf):
        return Meeting()
    along, length = tau @ _leading(merged), float(np.abs(tau).sum())
    agreed = float(np.vdot(tau, np.copysign(np.float32(1), merged)))  # Σ|τ| of one sign less that of the other
    return Meeting(min(1.0, float(np.vdot(along, along)) / square), min(1.0, max(0.0, 0.5 - agreed / length / 2)))


def _leading(merged: Single) -> Single:
    """About the first right singular vectors of an m×n matrix, n×k, by iteration of a subspace."""
    columns = merged.shape[1]
    drawn = np.random.default_rng(0).standard_normal((columns, min(LEADING, *merged.shape)))
    basis = np.linalg.qr(drawn.astype(np.float32))[0]
    for _ in range(_STEPS):
        basis = np.linalg.qr(merged.T @ (merged @ basis))[0]
    return basis
