"""OPCM: orthogonal projection of each new task vector against what was merged, with adaptive scaling.

Tang et al. 2025, "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging". The paper keeps the merged
model and rescales it at each step by λ_t; kept here is R_t = R_{t−1} + C_t, never rescaled: both have the same singular subspaces, and the paper's
merged task vector is R_t · n̄/‖R_t‖ with n̄ the mean norm of the task vectors (`read` under the policy `norm`, κ = 1).

For a matrix, with R = U S Vᵀ and r the 0-based index of the first k with Σ_{i≤k}σ_i / Σσ > α, at most the rank: U_r, V_r are the first r directions and
  block            C = τ − U_r (U_rᵀ τ V_r) V_rᵀ                            (the paper's released code)
  block+radial     then C −= ⟨C, R′⟩/‖R′‖² · R′, R′ = R minus its first r directions, so that C ⟂ R
  block+diagonal   then C −= Σ_{i≥r} (u_iᵀ τ v_i) u_i v_iᵀ                  (fusion_bench since March 2025; amplifies rounding, for parity)
  rows+columns     C = (I − U_r U_rᵀ) τ (I − V_r V_rᵀ)                      (the paper's text)
Everything that is no matrix: C = τ.

U is never formed: with Y = R V_r (= U_r Σ_r), U_rᵀ τ V_r = Σ_r⁻¹ Yᵀ τ V_r, in float64 and in blocks of rows of the tall side.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from continual import linalg
from continual.linalg import dot, sum_squares
from continual.records import SlotSpec, TensorSpec
from continual.rules import Accumulators, Folded, Inputs, ReadOptions, Rule, Totals, mean_norm, scale_of, settle

VARIANTS = ("block", "block+radial", "block+diagonal", "rows+columns")


def make(options: Mapping[str, Any]) -> Rule:
    """OPCM with `alpha` in [0, 1), a `variant`, and `include`: globs of plain tensors (embeddings, heads) that are to be matrices as well."""
    alpha, variant, include = float(options["alpha"]), str(options["variant"]), list(options["include"])

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, _totals: Totals) -> Folded:
        merged = accumulators["sum"]
        tau_sq, before_sq = sum_squares(tau), sum_squares(merged)
        sums = {"tau_sq": tau_sq, "before_sq": before_sq, "dot": dot(tau, merged) if tau_sq and before_sq else 0.0}
        notes: dict[str, float] = {}
        if tau_sq and is_matrix(inputs.spec, include):
            shape = (inputs.spec.shape[0], -1)
            split = project(merged.reshape(shape), tau.reshape(shape), alpha, variant) if before_sq and math.isfinite(tau_sq) else None
            kept = tau_sq if split is None else split.kept_sq
            notes = {"r": float(split.r if split else 0), "energy": kept / tau_sq}
            if split is None:
                merged.add_(tau)
        elif tau_sq:
            merged.add_(tau)
        return Folded({"sum": merged}, {**sums, "merged_sq": sum_squares(merged) if tau_sq else before_sq}, notes)

    def workspace(spec: TensorSpec) -> int:
        if not is_matrix(spec, include):
            return 0
        small = min(spec.shape[0], spec.numel // spec.shape[0])
        # Gram matrix, eigenvectors and LAPACK's 2n² of work, Y for half of the directions, a few blocks
        return 8 * (5 * small * small + spec.numel // 2 + 6 * linalg.CHUNK)

    return Rule("opcm", dict(options), _slots, fold, settle, _read, _gauges, workspace, group=False)


def is_matrix(spec: TensorSpec, include: Sequence[str]) -> bool:
    """Whether the spectral form applies: linear weights (2-D), convolutions (4-D, flattened to 2-D), and 2-D tensors that `include` names."""
    if spec.numel == 0 or len(spec.shape) not in (2, 4):
        return False
    return spec.kind == "matrix" or any(fnmatch.fnmatchcase(spec.name, glob) for glob in include)


def _slots(spec: TensorSpec) -> dict[str, SlotSpec]:
    return {"sum": SlotSpec(spec.shape)}


def _read(_spec: TensorSpec, accumulators: Accumulators, totals: Totals, options: ReadOptions) -> Tensor:
    return accumulators["sum"].mul(scale_of(totals, options))


def _gauges(totals: Totals) -> dict[str, float]:
    """λ_t = ‖R_t‖ / n̄, the paper's scaling factor; 1 after the first fold."""
    mean = mean_norm(totals)
    return {"lambda": math.sqrt(totals["merged_sq"]) / mean} if mean else {}


class Split(NamedTuple):
    """What a projection did: the number of directions in the block and ‖C‖²."""

    r: int
    kept_sq: float


def leading(tall: Tensor, alpha: float) -> tuple[linalg.Leading, int]:
    """Singular directions of R and r for `alpha`."""
    found = linalg.right_singular(tall)
    r = crossing(found, alpha)
    if not linalg.separated(found.sigma, r):
        found = linalg.right_singular_svd(tall)
        r = crossing(found, alpha)
    return found, r


def crossing(found: linalg.Leading, alpha: float) -> int:
    """The 0-based index of the first k with cumsum(σ)_k / Σσ > α, at most the rank."""
    share = found.sigma.cumsum(0) / found.sigma.sum()
    return min(int((share <= alpha).sum()), found.rank)


def project(merged: Tensor, tau: Tensor, alpha: float, variant: str) -> Split:
    """R += C in place, for R = `merged` and τ = `tau`, both m×n float32, R not zero; C and the sum are rounded once, from float64."""
    tall, task = (merged, tau) if merged.shape[0] >= merged.shape[1] else (merged.T, tau.T)
    found, r = leading(tall, alpha)
    sigma = found.sigma
    k = found.rank if variant == "block+diagonal" else r
    if k == 0:
        kept_sq = _apply(tall, task, lambda _part, t: t)
        return Split(r, kept_sq)
    v = found.vectors[:, :k].contiguous()
    del found
    y = torch.empty(tall.shape[0], k, dtype=torch.float64, device=tall.device)
    inner = torch.zeros(k, k, dtype=torch.float64, device=tall.device)  # Yᵀ τ V
    across = torch.zeros(k, tall.shape[1], dtype=torch.float64, device=tall.device) if variant == "rows+columns" else None  # Yᵀ τ
    for part in linalg.row_blocks(*tall.shape):
        t = task[part].double()
        torch.mm(tall[part].double(), v, out=y[part])
        inner.addmm_(y[part].T, t @ v)
        if across is not None:
            across.addmm_(y[part].T, t)
    inverse_sq = sigma[:k].pow(-2).unsqueeze(1)
    if across is not None:
        rest = inverse_sq * (across - inner @ v.T)  # Σ⁻² Yᵀ τ (I − V Vᵀ)
        return Split(r, _apply(tall, task, lambda part, t: t - (t @ v) @ v.T - y[part] @ rest))
    if variant == "block+diagonal":
        block = torch.zeros_like(inner)
        block[:r, :r] = inner[:r, :r]
        block.diagonal()[r:] = inner.diagonal()[r:]
        inner = block
    weights = (inverse_sq * inner) @ v.T  # k × n: Σ⁻¹ (Uᵀ τ V) Vᵀ

    def projected(part: slice, t: Tensor) -> Tensor:
        return t.addmm_(y[part], weights, alpha=-1)

    if variant != "block+radial":
        return Split(r, _apply(tall, task, projected))
    along = norm_sq = 0.0
    for part in linalg.row_blocks(*tall.shape):
        c, rest = projected(part, task[part].double()), tall[part].double().addmm_(y[part], v.T, alpha=-1)
        along += dot(c, rest)
        norm_sq += sum_squares(rest)
    ratio = along / norm_sq if norm_sq > (linalg.NULL * float(sigma[0])) ** 2 else 0.0
    return Split(r, _apply(tall, task, lambda p, t: projected(p, t) - ratio * tall[p].double().addmm_(y[p], v.T, alpha=-1)))


def _apply(tall: Tensor, task: Tensor, residual: Callable[[slice, Tensor], Tensor]) -> float:
    """R += C block by block, C = residual(rows, τ of these rows in float64); returns ‖C‖²."""
    kept = 0.0
    for part in linalg.row_blocks(*tall.shape):
        c = residual(part, task[part].double())
        kept += float(torch.dot(c.reshape(-1), c.reshape(-1)))
        tall[part] = (tall[part].double() + c).to(tall.dtype)
    return kept
