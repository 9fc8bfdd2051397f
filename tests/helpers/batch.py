"""What each rule's paper computes from all fine-tunes at once, in float64 with full decompositions; no code of the
package is used here.

A batch form takes the task vectors of every fine-tune (name to tensor) and the names of the matrices, and returns the
merged task vector at the scale that is the rule's default when it is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from tests.helpers import reference, triplets

Models = Sequence[Mapping[str, Tensor]]


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


def iso_c(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.iso)


def tsv_m(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.tsv)


def tsv_even(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.evened_tsv)


def tsv_u(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.tsv_of_outputs)


def tsv_w(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, lambda taus: triplets.weighed_tsv(taus, own=True))


def esm(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, lambda taus: triplets.weighed_tsv(taus, own=False))


def dc(models: Models, matrices: set[str], smooth: str = "none", density: float = 1e-3) -> dict[str, Tensor]:
    return _spectral(models, matrices, lambda taus: triplets.dc(taus, (), smooth, density))


def iso_cts(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.iso_cts)


def isotropic(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.flat_tsv)


def weighted(name: str, models: Models, matrices: set[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """The same with σ_i times w_i, and of what is no matrix the weighted mean."""
    found = _spectral(models, matrices, lambda taus: triplets.WEIGHTED[name](taus, weights))
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    plain = {n: torch.tensordot(shares, _stacked(models, n), 1) for n in models[0] if n not in matrices}
    return found | plain


def condition(matrix: Tensor) -> float:
    """The largest singular value over the smallest that is not null; 1 for zeros."""
    sigma = torch.linalg.svdvals(matrix)
    held = sigma[sigma > triplets.NULL * sigma.amax()] if sigma.numel() else sigma
    return float(held.amax() / held.amin()) if held.numel() else 1.0


def _summed(folded: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack([tau.double().flatten(1) for tau in folded]).sum(0)] if folded else []


def _triplets(folded: Sequence[Tensor]) -> list[Tensor]:
    parts = [triplets.leading(tau.double().flatten(1), len(folded)) for tau in folded]
    return [torch.cat([u for u, _, _ in parts], 1), torch.cat([vh for _, _, vh in parts])] if parts else []


def _left_triplets(folded: Sequence[Tensor]) -> list[Tensor]:
    return _triplets(folded)[:1]


def _flat_triplets(folded: Sequence[Tensor]) -> list[Tensor]:
    """The triplets; where they have null directions the spectrum of the merge counts too."""
    found = _triplets(folded)
    if any(int(torch.linalg.matrix_rank(part, rtol=triplets.NULL)) < max(found[0].shape[1], 1) for part in found):
        found.append(triplets.tsv([tau.double().flatten(1) for tau in folded]))
    return found


def _common_parts(folded: Sequence[Tensor]) -> list[Tensor]:
    cut = triplets.cuts([tau.double().flatten(1) for tau in folded])
    if not cut:
        return []
    us, _, vhs, near = triplets.common(cut)
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


def flow(
    models: Models, matrices: set[str], side: str = "both", time: float = 5.0, top: float = 1.0, start: str = "zero"
) -> dict[str, Tensor]:
    def merge(taus: list[Tensor]) -> Tensor:
        sides = {
            "right": lambda: triplets.flowed(taus, time, top, start),
            "left": lambda: triplets.flowed([tau.mT for tau in taus], time, top, start).mT,
        }
        found = [sides[one]() for one in sides if side in (one, "both")]
        return sum(found[1:], found[0]) / len(found)

    return _spectral(models, matrices, merge)


def tsv_flow(models: Models, matrices: set[str]) -> dict[str, Tensor]:
    return _spectral(models, matrices, triplets.flow_of_triplets)


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
    "tsv-even": tsv_even,
    "tsv-u": tsv_u,
    "tsv-w": tsv_w,
    "isotropic": isotropic,
    "esm": esm,
    "dc": dc,
    "iso-cts": iso_cts,
    "tsv-flow": tsv_flow,
    "gram": gram,
    "flow": flow,
    "opcm": opcm,
}
"""The batch form of every rule in the registry."""
POLAR: Mapping[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "iso-c": _summed,
    "tsv-m": _triplets,
    "tsv-even": _flat_triplets,
    "tsv-u": _left_triplets,
    "tsv-w": _triplets,
    "isotropic": _flat_triplets,
    "esm": _triplets,
    "dc": _triplets,
    "iso-cts": _common_parts,
}
"""Of the rules that take polar factors: the matrices whose factors they are, for one matrix of every fine-tune."""


def regmean(
    taus: Sequence[Tensor], moments: Sequence[Tensor], weights: Sequence[float], alpha: float, *, across: bool = False
) -> Tensor:
    """RegMean of one matrix: Σ w·τ·C·(Σ w·C)⁻¹, what is off the diagonals of the second moments C of the inputs being
    multiplied by `alpha`; `across`: the inputs meet the rows of τ. Each C gets 1e-6 of the mean of all diagonals."""
    flat = [tau.double().flatten(1) for tau in taus]
    shrunk = []
    level = torch.stack([moment.double().diagonal() for moment in moments]).mean()
    for moment, weight in zip(moments, weights, strict=True):
        diagonal = torch.diag(moment.double().diagonal())
        floor = 1e-6 * level * torch.eye(len(moment), dtype=torch.float64)
        shrunk.append(weight * (alpha * moment.double() + (1 - alpha) * diagonal + floor))
    total = torch.stack(shrunk).sum(0)
    if across:
        return torch.linalg.inv(total) @ sum(c @ tau for c, tau in zip(shrunk, flat, strict=True))
    return sum(tau @ c for c, tau in zip(shrunk, flat, strict=True)) @ torch.linalg.inv(total)
