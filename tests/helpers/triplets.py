"""What the papers of the rules that read triplets, and Iso-C's, make of the matrices of all fine-tunes, in float64 with
full decompositions. `batch` puts whole models through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

NULL = 1e-6
"""Singular values at or below this fraction of the largest count as zero."""
Cut = list[tuple[Tensor, Tensor, Tensor]]
"""Of each fine-tune that has any: U, σ and Vᵀ of its leading triplets."""


def iso(taus: list[Tensor]) -> Tensor:
    if len(taus) == 1:
        return taus[0]
    u, sigma, vh = torch.linalg.svd(torch.stack(taus).sum(0), full_matrices=False)
    held = sigma > NULL * sigma[0]
    return sigma[held].mean() * u[:, held] @ vh[held]


def polar(columns: Tensor) -> Tensor:
    p, d, qh = torch.linalg.svd(columns, full_matrices=False)
    held = d > NULL * d[0]
    return p[:, held] @ qh[held]


def leading(tau: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(tau, full_matrices=False)
    k = min(len(sigma) // count, int((sigma > NULL * sigma[0]).sum()))
    return u[:, :k], sigma[:k], vh[:k]


def tsv(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    us, sigmas, vhs = zip(*(leading(tau, len(taus)) for tau in taus), strict=True)
    if not any(len(sigma) for sigma in sigmas):
        return torch.zeros_like(taus[0])
    if weights:
        sigmas = tuple(weight * sigma for weight, sigma in zip(weights, sigmas, strict=True))
    return polar(torch.cat(us, 1)) @ torch.diag(torch.cat(sigmas)) @ polar(torch.cat(vhs).mT).mT


def evened_tsv(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """PΣQᵀ, its singular values to the power √(few/many) of the ranks of U and V."""
    x = tsv(taus, weights)
    parts = [leading(tau, len(taus)) for tau in taus]
    sides = torch.cat([u for u, _, _ in parts], 1), torch.cat([vh for _, _, vh in parts])
    few, many = sorted(int(torch.linalg.matrix_rank(side, rtol=NULL)) for side in sides)
    if few == many:
        return x
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    held = sigma[:few] > NULL * sigma[0]
    sigma = sigma[0] * (sigma[:few][held] / sigma[0]) ** math.sqrt(few / many)
    return u[:, :few][:, held] * sigma @ vh[:few][held]


def tsv_of_outputs(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """PΣVᵀ: P alone is a polar factor."""
    us, sigmas, vhs = zip(*(leading(tau, len(taus)) for tau in taus), strict=True)
    if not any(len(sigma) for sigma in sigmas):
        return torch.zeros_like(taus[0])
    weights = weights or [1.0] * len(taus)
    sigma = torch.cat([weight * one for weight, one in zip(weights, sigmas, strict=True)])
    return polar(torch.cat(us, 1)) @ torch.diag(sigma) @ torch.cat(vhs)


def weighed_tsv(taus: list[Tensor], weights: Sequence[float] = (), *, own: bool, power: float = 3.0) -> Tensor:
    """PΣQᵀ, or σ̄·PQᵀ, of a polar factor Q of V with its columns times σ^power, 1e-3 of the largest at least."""
    weights = weights or [1.0] * len(taus)
    if len(taus) == 1:
        return weights[0] * taus[0]
    us, sigmas, vhs = zip(*(leading(tau, len(taus)) for tau in taus), strict=True)
    sigma = torch.cat([weight * one for weight, one in zip(weights, sigmas, strict=True)])
    if not len(sigma):
        return torch.zeros_like(taus[0])
    each = torch.maximum(sigma**power, 1e-3 * sigma.max() ** power)
    left, right = polar(torch.cat(us, 1)), polar(torch.cat(vhs).mT @ torch.diag(each))
    return left @ torch.diag(sigma if own else sigma.mean().expand(len(sigma))) @ right.mT


def cuts(taus: list[Tensor], weights: Sequence[float] = ()) -> Cut:
    """The triplets of each that has any, times its weight."""
    weighed = [weight * tau for weight, tau in zip(weights or [1.0] * len(taus), taus, strict=True)]
    return [found for tau in weighed if len((found := leading(tau, len(taus)))[1])]


def _of_several(taus: list[Tensor], weights: Sequence[float], make: Callable[[Cut], Tensor]) -> Tensor:
    """One fine-tune alone as it is; of several what `make` makes of their triplets."""
    if len(taus) == 1:
        return (weights or [1.0])[0] * taus[0]
    cut = cuts(taus, weights)
    return make(cut) if cut else torch.zeros_like(taus[0])


def dc(taus: list[Tensor], weights: Sequence[float] = (), smooth: str = "none", density: float = 1e-3) -> Tensor:
    """P·M·Qᵀ: the core of each as a whole, trimmed by a full sort; signs over a stack of them; the mask as a matrix."""
    return _of_several(taus, weights, lambda cut: _dc(cut, smooth, density))


def _dc(cut: Cut, smooth: str, density: float) -> Tensor:
    left, right = polar(torch.cat([u for u, _, _ in cut], 1)), polar(torch.cat([vh for _, _, vh in cut]).mT)
    cores, blocks = [], []
    for u, sigma, vh in cut:
        k = len(sigma)
        if smooth == "mean":
            sigma = sigma.mean().expand(k)
        elif smooth == "linear":
            line = torch.linspace(min(5.0, float(sigma[0] / sigma[-1])), 1.0, k, dtype=torch.float64)
            sigma = sigma.sum() * line / line.sum()
        core = left.mT @ (u @ torch.diag(sigma) @ vh) @ right
        ordered = core.abs().flatten().sort(descending=True).values
        least = max((1 - 1e-4) * ordered[max(k, int(density * core.numel())) - 1], NULL * ordered[0])
        cores.append(torch.where(core.abs() >= least, core, 0.0))
        blocks.append(torch.ones(k, k, dtype=torch.float64))
    values = torch.stack(cores)
    total = values.sum(0)
    sign = torch.where(total.abs() > 2.0**-20 * values.abs().sum(0), total.sign(), 0.0)
    agree = (values.sign() == sign) & (sign != 0)
    merged = torch.where(agree, values, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    return left @ (merged * torch.block_diag(*blocks)) @ right.mT


def common(cut: Cut) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """U, σ and V side by side, the common ones first; and what shows how near the cuts are to other ones."""
    kept = [u @ torch.diag(sigma) @ vh for u, sigma, vh in cut]
    rank = sum(len(sigma) for _, sigma, _ in cut)
    own = min(rank // len(cut), round((rank - int(0.8 * rank)) / len(cut)))
    us, sigmas, vhs, near = [], [], [], []
    p = None
    for tau, count in [(torch.stack(kept).sum(0), rank - own * len(cut)), *((tau, own) for tau in kept)]:
        u, sigma, vh = torch.linalg.svd(tau if p is None else tau - p @ p.mT @ tau, full_matrices=False)
        held = min(count, int((sigma > NULL * torch.linalg.svdvals(tau)[0]).sum()))
        if held:  # a direction is as sharp as the singular value that it is found from
            near.append(torch.diag(torch.stack([torch.linalg.svdvals(tau)[0], sigma[held - 1]])))
        if 0 < held < len(sigma):
            near.append(torch.diag(torch.stack([sigma[0], sigma[held - 1] - sigma[held]])))
        us, sigmas, vhs = [*us, u[:, :held]], [*sigmas, sigma[:held]], [*vhs, vh[:held]]
        p = us[0]
    return us, sigmas, vhs, near


def iso_cts(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    return _of_several(taus, weights, _iso_cts)


def _iso_cts(cut: Cut) -> Tensor:
    us, sigmas, vhs, _ = common(cut)
    return torch.cat(sigmas).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vhs).mT).mT


def flat_tsv(taus: list[Tensor]) -> Tensor:
    return taus[0] if len(taus) == 1 else iso([tsv(taus), torch.zeros_like(taus[0])])


def flowed(taus: list[Tensor], time: float, top: float, start: str, weights: Sequence[float] = ()) -> Tensor:
    """Where the gradient flow of ½Σ ‖(X − τ_i)τ_iᵀ‖²/‖τ_i‖² stands at s = time/λ̄: the flow with −XA + B is linear, so
    one matrix exponential takes it there. Within the span of the eigenvectors of the n·top largest eigenvalues. A term
    of B counts `weights` times."""
    n, total = taus[0].shape[1], torch.stack(taus).sum(0)
    each = [weight for weight, tau in zip(weights or [1.0] * len(taus), taus, strict=True) if float(tau.norm()) > 0]
    taus = [tau for tau in taus if float(tau.norm()) > 0]
    if not taus:
        return total
    gram = sum((tau.mT @ tau / tau.square().sum() for tau in taus), torch.zeros(n, n, dtype=torch.float64))
    terms = (weight * tau @ tau.mT @ tau / tau.square().sum() for weight, tau in zip(each, taus, strict=True))
    cross = sum(terms, torch.zeros_like(total))
    u, _, _ = torch.linalg.svd(gram)
    held = u[:, : math.ceil(top * n)] @ u[:, : math.ceil(top * n)].mT
    s = time / (len(taus) / n)  # each Gram has the trace 1
    # d/ds [X 1] = [X 1]·[[−A, 0], [B, 0]]
    m = len(total)
    step = torch.zeros(n + m, n + m, dtype=torch.float64)
    step[:n, :n], step[n:, :n] = -s * gram, s * cross
    power = torch.linalg.matrix_exp(step)
    found = power[n:, :n] + (total @ power[:n, :n] if start == "sum" else 0.0)
    return found @ held


def flow_of_triplets(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """The flow of what the leading triplets of each make, stopped at 5/λ̄."""
    weights = weights or [1.0] * len(taus)
    if len(taus) == 1:
        return weights[0] * taus[0]
    cut = [u @ torch.diag(sigma) @ vh for u, sigma, vh in (leading(tau, len(taus)) for tau in taus)]
    right = flowed(cut, 5.0, 1.0, "zero", weights)
    return (right + flowed([tau.mT for tau in cut], 5.0, 1.0, "zero", weights).mT) / 2


WEIGHTED: Mapping[str, Callable[[list[Tensor], Sequence[float]], Tensor]] = {
    "tsv-m": tsv,
    "tsv-even": evened_tsv,
    "tsv-u": tsv_of_outputs,
    "tsv-w": lambda taus, weights: weighed_tsv(taus, weights, own=True),
    "esm": lambda taus, weights: weighed_tsv(taus, weights, own=False),
    "dc": dc,
    "iso-cts": iso_cts,
    "tsv-flow": flow_of_triplets,
}
"""Rules that read triplets, with weights of the models."""
