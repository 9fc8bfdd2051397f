"""What a peer makes of the same fine-tunes: run by `tests.campaigns.bench.peers` in an environment that has it, never
with this package.

python peers_worker.py PEER BASE.safetensors OUT.safetensors ALPHA DENSITY GAMMA RATE FINE_TUNE.safetensors...
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def holder(tensors: Tensors) -> nn.Module:
    """The tensors as those of a module, which is what some functions want; as buffers, since they refuse to add tensors
    to parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name.replace(".", "/"), tensor.clone())
    return module


def mergekit(taus: list[Tensors], density: float, gamma: float, rate: float) -> dict[str, Tensors]:
    """Sparsification of the first task vector, and TIES as its generalised task arithmetic does it with equal
    weights."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import RescaleNorm, bernoulli, magnitude, magnitude_outliers

    def ties(deltas: Tensor) -> Tensor:
        kept = torch.stack([magnitude(tau, density) for tau in deltas])
        mask = get_mask(kept, method="sum")
        return (kept * mask).sum(0) / mask.sum(0).clamp(min=1)

    torch.manual_seed(0)
    return {
        "mergekit ties": {n: ties(torch.stack([tau[n] for tau in taus])) for n in taus[0]},
        "mergekit trim": {n: magnitude(tau, density) for n, tau in taus[0].items()},
        "mergekit breadcrumbs": {n: magnitude_outliers(tau, 0.5, gamma=gamma) for n, tau in taus[0].items()},
        "mergekit dare": {n: bernoulli(tau, 1 - rate, RescaleNorm.l1) for n, tau in taus[0].items()},
    }


def fusion_bench(
    base: Tensors, tuned: list[Tensors], taus: list[Tensors], alpha: float, density: float, rate: float
) -> dict[str, Tensors]:
    """Every method on all fine-tunes; OPCM one step, from the first to the second; DARE on the first."""
    from fusion_bench.method.dare.utils import param_random_drop_
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    from fusion_bench.method.magmax.magmax import _magmax_select
    from fusion_bench.method.opcm.opcm import OPCMForCLIP
    from fusion_bench.method.task_arithmetic.task_arithmetic import task_arithmetic_merge
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    names = list(base)
    plain = [n for n in names if base[n].ndim == 2 and ("embed" in n or "lm_head" in n)]
    merged = holder(base)
    task_arithmetic_merge(merged, [holder(one) for one in tuned], 0.3)
    flat = torch.stack([torch.cat([tau[n].flatten() for n in names]) for tau in taus])
    whole = ties_merging(flat, reset_thresh=density, merge_func="mean").split([base[n].numel() for n in names])
    # λ is 1 at the first step, and while the raw result is made
    method, step = SimpleNamespace(previous_lambda_t=1, lambda_t=1), {}
    for n in names:
        given = (method, tuned[0][n], base[n], tuned[1][n], n)
        if base[n].ndim == 2 and n not in plain:
            step[n] = OPCMForCLIP.merge_linear_weights(*given, alpha) - base[n]
        else:
            step[n] = OPCMForCLIP.merge_other_parameters(*given) - base[n]
    torch.manual_seed(0)
    dropped = {n: nn.Parameter(tau.clone(), requires_grad=False) for n, tau in taus[0].items()}
    for parameter in dropped.values():
        param_random_drop_(parameter, rate, rescale=True)
    return {
        "fusion_bench task arithmetic": {n: merged.get_buffer(n.replace(".", "/")) - base[n] for n in names},
        "fusion_bench ties": {n: part.view(base[n].shape) for n, part in zip(names, whole, strict=True)},
        "fusion_bench magmax": _magmax_select(taus),
        "fusion_bench iso-c": iso_c(taus, accelerator="cpu", exclude_keys=plain),
        "fusion_bench tsv-m": compute_and_sum_svd_mem_reduction(taus, exclude_keys=plain, accelerator="cpu"),
        "fusion_bench opcm": step,
        "fusion_bench dare": {n: p.data for n, p in dropped.items()},
    }


def main() -> None:
    """Results are named METHOD|TENSOR."""
    peer, base_file, out, *rest = sys.argv[1:]
    alpha, density, gamma, rate = (float(value) for value in rest[:4])
    base, tuned = load_file(base_file), [load_file(file) for file in rest[4:]]
    taus = [{name: tensor - base[name] for name, tensor in one.items()} for one in tuned]
    found = (
        mergekit(taus, density, gamma, rate)
        if peer == "mergekit"
        else fusion_bench(base, tuned, taus, alpha, density, rate)
    )
    save_file({f"{method}|{n}": t.contiguous() for method, tensors in found.items() for n, t in tensors.items()}, out)


if __name__ == "__main__":
    main()
