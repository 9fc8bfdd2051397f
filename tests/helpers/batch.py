"""What each rule's paper computes from all fine-tunes at once, in float64 with full decompositions; no code of the
package is used here.

A batch form takes the task vectors of every fine-tune (name to tensor) and the names of the matrices, and returns the
merged task vector at the scale that is the rule's default when it is read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from tests.helpers import reference

Models = Sequence[Mapping[str, Tensor]]
NULL = 1e-6


def _stacked(models: Models, name: str) -> Tensor:
    return torch.stack([model[name].double() for model in models])


def mean(models: Models, _matrices: set[str]) -> dict[str, Tensor]:
    return {name: _stacked(models, name).mean(0) for name in models[0]}


def task_arithmetic(models: Models, _matrices: set[str]) -> dict[str, Tensor]:
    return {name: 0.3 * _stacked(models, name).sum(0) for name in models[0]}


def moments_of(tau: Tensor) -> Tensor:
    """What the fine-tunes of these tests ship beside a weight: positive, of very different sizes, and some zeros."""
    return (tau * 100).square() + (torch.arange(tau.numel()).view(tau.shape) % 3) * 0.01


def fisher(models: Models, _matrices: set[str], shipped: Models = ()) -> dict[str, Tensor]:
    found = {}
    for name in models[0]:
        weights = torch.stack([moments_of(model[name]) for model in shipped or models]).double()
        total = weights.sum(0)
        found[name] = torch.where(total > 0, (weights * _stacked(models, name)).sum(0) / total.clamp(min=1e-300), 0.0)
    return found


def seed_of(name: str, tau: Tensor) -> int:
    """A number that depends on the content and name of a tensor, as the engine makes one."""
    return zlib.crc32(tau.contiguous().numpy().tobytes() + name.encode())


def transformed(model: Mapping[str, Tensor], before: Sequence[str]) -> dict[str, Tensor]:
    """A model after the transforms written as in the settings, each by its definition: full sorts, and the whole stream
    of random words at once."""
    seeds = {name: seed_of(name, tau) for name, tau in model.items()}
    for place, text in enumerate(before):
        name, *pairs = text.split(":")
        options = dict(pair.split("=") for pair in pairs)
        if name == "trim" and options.get("over") != "tensor":
            flat = _top(torch.cat([tau.flatten() for tau in model.values()]), float(options["density"]))
            parts = flat.split([tau.numel() for tau in model.values()])
            model = {n: part.view(tau.shape) for (n, tau), part in zip(model.items(), parts, strict=True)}
        elif name == "trim":
            model = {n: _top(tau, float(options["density"])) for n, tau in model.items()}
        elif name == "drop":
            model = {
                n: _dropped(
                    tau,
                    f"{seeds[n] + place} {options.get('seed', 0)}",
                    float(options["rate"]),
                    options.get("rescale") != "false",
                )
                for n, tau in model.items()
            }
        else:
            model = {n: _crumbs(tau, float(options["top"]), float(options["bottom"])) for n, tau in model.items()}
    return dict(model)


def _dropped(tau: Tensor, seed: str, rate: float, rescale: bool) -> Tensor:
    words = (
        np.random.Philox(key=int.from_bytes(blake3(seed.encode()).digest(16), "little"))
        .random_raw(tau.numel() // 2 + 1)
        .view(np.uint32)
    )
    kept = torch.from_numpy(words[: tau.numel()] / 2**32 >= rate).view(tau.shape)
    return torch.where(kept, tau / (1 - rate) if rescale else tau, 0.0)


def _crumbs(tau: Tensor, top: float, bottom: float) -> Tensor:
    size = tau.numel()
    if not size:
        return tau
    order = tau.abs().flatten().argsort()
    kept = torch.zeros(size)
    kept[order[int(bottom * size) : size - int(top * size)]] = 1.0
    return tau * kept.view(tau.shape)


def opcm_step(total: Tensor, tau: Tensor, alpha: float, variant: str) -> Tensor:
    """C of one matrix by a full float64 SVD of R, as the formula of the variant says."""
    u, sigma, vh = torch.linalg.svd(total.double(), full_matrices=False)
    tau, v = tau.double(), vh.mT
    share = sigma.cumsum(0) / sigma.sum()
    r = int((share > alpha).nonzero()[0])
    left, right = u[:, :r] @ u[:, :r].mT, v[:, :r] @ v[:, :r].mT
    if variant == "rows":
        return tau - left @ tau
    if variant == "columns":
        return tau - tau @ right
    if variant == "rows+columns":
        return tau - left @ tau - tau @ right + left @ tau @ right
    found = tau - left @ tau @ right
    if variant == "block+diagonal":
        found = found - u[:, r:] @ torch.diag((u.mT @ tau @ v).diagonal()[r:]) @ vh[r:]
    if variant == "block+radial":
        rest = total.double() - u[:, :r] @ torch.diag(sigma[:r]) @ vh[:r]
        found = found - (found * rest).sum() / rest.square().sum() * rest
    return found


def magmax(models: Models, _matrices: set[str]) -> dict[str, Tensor]:
    found = {}
    for name in models[0]:
        values = _stacked(models, name)
        highest, lowest = values.amax(0), values.amin(0)
        found[name] = 0.5 * torch.where(highest >= -lowest, highest, lowest)
    return found


def _top(values: Tensor, density: float) -> Tensor:
    """Zeros but for the ⌊density·N⌋ of largest magnitude and those equal to the smallest of them; by a full sort."""
    if not values.numel():
        return values
    kept = max(1, int(density * values.numel()))
    least = values.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(values.abs() >= least, values, 0.0)


def ties(models: Models, _matrices: set[str], density: float = 0.2, trim: str = "model") -> dict[str, Tensor]:
    names = list(models[0])
    found = {}
    flat = [torch.cat([model[name].double().flatten() for name in names]) for model in models]
    whole = [
        dict(zip(names, _top(values, density).split([models[0][n].numel() for n in names]), strict=True))
        for values in flat
    ]
    for name in names:
        rows = [
            _top(m[name].double(), density).flatten() if trim == "tensor" else w[name]
            for m, w in zip(models, whole, strict=True)
        ]
        values = torch.stack(rows)
        total = values.sum(0)
        elected = torch.where(total.abs() > 2.0**-20 * values.abs().sum(0), total.sign(), 0.0)
        agree = (values.sign() == elected) & (elected != 0)
        found[name] = (torch.where(agree, values, 0.0).sum(0) / agree.sum(0).clamp(min=1)).reshape(
            models[0][name].shape
        )
    return found


def _spectral(models: Models, matrices: set[str], merge: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    merged = mean(models, matrices)
    for name in matrices:
        shape = models[0][name].shape
        merged[name] = merge([model[name].double().flatten(1) for model in models]).reshape(shape)
    return merged


def _iso(taus: list[Tensor]) -> Tensor:
    if len(taus) == 1:
        return taus[0]
    u, sigma, vh = torch.linalg.svd(torch.stack(taus).sum(0), full_matrices=False)
    held = sigma > NULL * sigma[0]
    return sigma[held].mean() * u[:, held] @ vh[held]


def iso_c(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, _iso)


def _polar(columns: Tensor) -> Tensor:
    p, d, qh = torch.linalg.svd(columns, full_matrices=False)
    held = d > NULL * d[0]
    return p[:, held] @ qh[held]


def _leading(tau: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(tau, full_matrices=False)
    k = min(len(sigma) // count, int((sigma > NULL * sigma[0]).sum()))
    return u[:, :k], sigma[:k], vh[:k]


def _tsv(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    us, sigmas, vhs = zip(*(_leading(tau, len(taus)) for tau in taus), strict=True)
    if not any(len(sigma) for sigma in sigmas):
        return torch.zeros_like(taus[0])
    if weights:
        sigmas = tuple(weight * sigma for weight, sigma in zip(weights, sigmas, strict=True))
    return _polar(torch.cat(us, 1)) @ torch.diag(torch.cat(sigmas)) @ _polar(torch.cat(vhs).mT).mT


def tsv_m(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, _tsv)


def _weighed_tsv(taus: list[Tensor], weights: Sequence[float] = (), *, own: bool, power: float = 3.0) -> Tensor:
    """PΣQᵀ, or σ̄·PQᵀ, of a polar factor Q of V with its columns times σ^power, 1e-3 of the largest at least."""
    weights = weights or [1.0] * len(taus)
    if len(taus) == 1:
        return weights[0] * taus[0]
    us, sigmas, vhs = zip(*(_leading(tau, len(taus)) for tau in taus), strict=True)
    sigma = torch.cat([weight * one for weight, one in zip(weights, sigmas, strict=True)])
    if not len(sigma):
        return torch.zeros_like(taus[0])
    each = torch.maximum(sigma**power, 1e-3 * sigma.max() ** power)
    left, right = _polar(torch.cat(us, 1)), _polar(torch.cat(vhs).mT @ torch.diag(each))
    return left @ torch.diag(sigma if own else sigma.mean().expand(len(sigma))) @ right.mT


def tsv_w(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, lambda taus: _weighed_tsv(taus, own=True))


def esm(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, lambda taus: _weighed_tsv(taus, own=False))


def _cut(taus: list[Tensor], weights: Sequence[float] = ()) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The triplets of each that has any, times its weight."""
    weighed = [weight * tau for weight, tau in zip(weights or [1.0] * len(taus), taus, strict=True)]
    return [found for tau in weighed if len((found := _leading(tau, len(taus)))[1])]


def _dc(taus: list[Tensor], weights: Sequence[float] = (), smooth: str = "none", density: float = 1e-3) -> Tensor:
    """P·M·Qᵀ: the core of each as a whole, trimmed by a full sort; signs over a stack of them; the mask as a matrix."""
    weights = weights or [1.0] * len(taus)
    if len(taus) == 1:
        return weights[0] * taus[0]
    cut = _cut(taus, weights)
    if not cut:
        return torch.zeros_like(taus[0])
    left, right = _polar(torch.cat([u for u, _, _ in cut], 1)), _polar(torch.cat([vh for _, _, vh in cut]).mT)
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


def dc(models: Models, matrices: set[str], smooth: str = "none", density: float = 1e-3) -> dict[str, Tensor]:
    return _spectral(models, matrices, lambda taus: _dc(taus, (), smooth, density))


def _common(cut: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
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


def _iso_cts(taus: list[Tensor], weights: Sequence[float] = ()) -> Tensor:
    weights = weights or [1.0] * len(taus)
    if len(taus) == 1:
        return weights[0] * taus[0]
    cut = _cut(taus, weights)
    if not cut:
        return torch.zeros_like(taus[0])
    us, sigmas, vhs, _ = _common(cut)
    return torch.cat(sigmas).mean() * _polar(torch.cat(us, 1)) @ _polar(torch.cat(vhs).mT).mT


def iso_cts(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, _iso_cts)


def _flat_tsv(taus: list[Tensor]) -> Tensor:
    return taus[0] if len(taus) == 1 else _iso([_tsv(taus), torch.zeros_like(taus[0])])


def isotropic(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, _flat_tsv)


WEIGHTED: Mapping[str, Callable[[list[Tensor], Sequence[float]], Tensor]] = {
    "tsv-m": _tsv,
    "tsv-w": lambda taus, weights: _weighed_tsv(taus, weights, own=True),
    "esm": lambda taus, weights: _weighed_tsv(taus, weights, own=False),
    "dc": _dc,
    "iso-cts": _iso_cts,
}
"""Rules that read triplets, with weights of the models."""


def weighted(name: str, models: Models, matrices: set[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """The same with σ_i times w_i, and of what is no matrix the weighted mean."""
    found = _spectral(models, matrices, lambda taus: WEIGHTED[name](taus, weights))
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    plain = {n: torch.tensordot(shares, _stacked(models, n), 1) for n in models[0] if n not in matrices}
    return found | plain


def condition(matrix: Tensor) -> float:
    """The largest singular value over the smallest that is not null; 1 for zeros."""
    sigma = torch.linalg.svdvals(matrix)
    held = sigma[sigma > NULL * sigma.amax()] if sigma.numel() else sigma
    return float(held.amax() / held.amin()) if held.numel() else 1.0


def _summed(folded: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack([tau.double().flatten(1) for tau in folded]).sum(0)] if folded else []


def _triplets(folded: Sequence[Tensor]) -> list[Tensor]:
    parts = [_leading(tau.double().flatten(1), len(folded)) for tau in folded]
    return [torch.cat([u for u, _, _ in parts], 1), torch.cat([vh for _, _, vh in parts])] if parts else []


def _flat_triplets(folded: Sequence[Tensor]) -> list[Tensor]:
    """The triplets; where they have null directions the spectrum of the merge counts too."""
    found = _triplets(folded)
    if any(int(torch.linalg.matrix_rank(part, rtol=NULL)) < max(found[0].shape[1], 1) for part in found):
        found.append(_tsv([tau.double().flatten(1) for tau in folded]))
    return found


def _common_parts(folded: Sequence[Tensor]) -> list[Tensor]:
    cut = _cut([tau.double().flatten(1) for tau in folded])
    if not cut:
        return []
    us, _, vhs, near = _common(cut)
    return [torch.cat(us, 1), torch.cat(vhs), *near]


def _least_squares(taus: list[Tensor], ridge: float) -> Tensor:
    """argmin Σ ‖(X − τ_i)τ_iᵀ‖²/‖τ_i‖² + ε‖X‖² by a QR of the stacked system, not by its normal equations."""
    taus = [tau for tau in taus if float(tau.norm()) > 0]
    if not taus:
        return torch.zeros(())
    n = taus[0].shape[1]
    epsilon = ridge * len(taus) / n  # relative to the mean diagonal: each Gram has the trace 1
    left = torch.cat([*(tau / tau.norm() for tau in taus), epsilon**0.5 * torch.eye(n, dtype=torch.float64)])
    right = torch.cat(
        [*(tau @ tau.mT / tau.norm() for tau in taus), torch.zeros(n, taus[0].shape[0], dtype=torch.float64)]
    )
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.mT


def _gram(taus: list[Tensor]) -> Tensor:
    right, left = _least_squares(taus, 0.1), _least_squares([tau.mT for tau in taus], 0.1)
    return (right + left.mT) / 2 if right.ndim else torch.zeros_like(taus[0])


def gram(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, _gram)


def _flowed(taus: list[Tensor], time: float, top: float, start: str) -> Tensor:
    """Where the gradient flow of ½Σ ‖(X − τ_i)τ_iᵀ‖²/‖τ_i‖² stands at s = time/λ̄: the flow with −XA + B is linear, so
    one matrix exponential takes it there. Within the span of the eigenvectors of the n·top largest eigenvalues."""
    n, total = taus[0].shape[1], torch.stack(taus).sum(0)
    taus = [tau for tau in taus if float(tau.norm()) > 0]
    if not taus:
        return total
    gram = sum((tau.mT @ tau / tau.square().sum() for tau in taus), torch.zeros(n, n, dtype=torch.float64))
    cross = sum((tau @ tau.mT @ tau / tau.square().sum() for tau in taus), torch.zeros_like(total))
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


def flow(
    models: Models, matrices: set[str], side: str = "both", time: float = 5.0, top: float = 1.0, start: str = "zero"
) -> dict[str, Tensor]:
    def merge(taus: list[Tensor]) -> Tensor:
        sides = {
            "right": lambda: _flowed(taus, time, top, start),
            "left": lambda: _flowed([tau.mT for tau in taus], time, top, start).mT,
        }
        found = [sides[one]() for one in sides if side in (one, "both")]
        return sum(found[1:], found[0]) / len(found)

    return _spectral(models, matrices, merge)


def opcm(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return reference.opcm(models, matrices, 0.5)


BATCH: Mapping[str, Callable[[Models, set[str]], dict[str, Tensor]]] = {
    "mean": mean,
    "task-arithmetic": task_arithmetic,
    "fisher": fisher,
    "ties": ties,
    "magmax": magmax,
    "iso-c": iso_c,
    "tsv-m": tsv_m,
    "tsv-w": tsv_w,
    "isotropic": isotropic,
    "esm": esm,
    "dc": dc,
    "iso-cts": iso_cts,
    "gram": gram,
    "flow": flow,
    "opcm": opcm,
}
"""The batch form of every rule in the registry."""
POLAR: Mapping[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "iso-c": _summed,
    "tsv-m": _triplets,
    "tsv-w": _triplets,
    "isotropic": _flat_triplets,
    "esm": _triplets,
    "dc": _triplets,
    "iso-cts": _common_parts,
}
"""Of the rules that take polar factors: the matrices whose factors they are, for one matrix of every fine-tune."""
