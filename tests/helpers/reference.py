"""Float64 references with full singular value decompositions, straight from the formulas; no shortcut of the package is
used here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NULL = 1e-6


def project(total: Tensor, tau: Tensor, alpha: float, variant: str) -> tuple[Tensor, int]:
    """C and r of one m×n task vector against R, both float64: D = U S Vᵀ in full, P = Uᵀ τ V, a part of P zeroed, C = U
    P Vᵀ."""
    if not total.any():
        return tau, 0
    u, sigma, vh = torch.linalg.svd(total, full_matrices=True)
    share = sigma.cumsum(0) / sigma.sum()
    rank = int((sigma > NULL * sigma[0]).sum())
    r = min(next(k for k in range(len(sigma)) if share[k] > alpha), rank)
    p = u.mT @ tau @ vh.mT
    if variant == "rows+columns":
        p[:r] = 0.0
        p[:, :r] = 0.0
        return u @ p @ vh, r
    p[:r, :r] = 0.0
    if variant == "block+diagonal":
        for i in range(r, rank):
            p[i, i] = 0.0
    c = u @ p @ vh
    if variant == "block+radial":
        rest = total - u[:, :r] @ torch.diag(sigma[:r]) @ vh[:r]
        c = c - (c * rest).sum() / (rest * rest).sum() * rest
    return c, r


def opcm(
    models: Sequence[Mapping[str, Tensor]], matrices: set[str], alpha: float, variant: str = "block"
) -> dict[str, Tensor]:
    """Merged task vectors of OPCM as the paper writes it: λ recomputed at every step, D rescaled, tensors in any shape
    (matrices as out × rest)."""
    merged = {name: tau.double() for name, tau in models[0].items()}
    lam, norms = 1.0, [norm(models[0])]
    for model in models[1:]:
        raw = {}
        for name, tau32 in model.items():
            d, tau = merged[name], tau32.double()
            c = tau
            if name in matrices:
                flat, _ = project(d.flatten(1), tau.flatten(1), alpha, variant)
                c = flat.reshape(tau.shape)
            raw[name] = lam * d + c
        norms.append(norm(model))
        lam = norm(raw) / (math.fsum(norms) / len(norms))
        merged = {name: value / lam for name, value in raw.items()}
    return merged


def norm(model: Mapping[str, Tensor]) -> float:
    """L2 norm over a whole model."""
    return math.sqrt(math.fsum(float(value.double().square().sum()) for value in model.values()))
