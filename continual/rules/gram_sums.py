"""The sums that `gram` and `flow` read: of every matrix A = Σ wτᵀτ/‖τ‖² (right), A′ = Σ wττᵀ/‖τ‖² (left) and B = Σ
wττᵀτ/‖τ‖² (cross), and S = Σ wτ (sum) where it is asked for. No rule lives here.

They are the terms of the objective of WUDI-Merging (Cheng et al. 2025, "Whoever Started the Interference Should End
It", equation 6), which is quadratic in the merged task vector: Σ ‖(X − τ_i)τ_iᵀ‖²/‖τ_i‖² = tr XAXᵀ − 2 tr XBᵀ + const,
and on the other side Σ ‖τ_iᵀ(X − τ_i)‖²/‖τ_i‖² = tr XᵀA′X − 2 tr XᵀB + const. Everything that is no matrix is a sum.

B is float64. A and A′ are symmetric: their lower triangles are kept, in float32, folded into half the rows. What
float32 takes away there moves what is read by less than 2e-6 of the largest task vector at a ridge of 0.1 or a time of
10, and in proportion to one over the ridge; in B it would be five times that (ops/decisions/0055).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import SlotSpec, Totals
from continual.rules import gram_less, matrices, sums
from continual.rules.apart import Apart, LeftOut
from continual.rules.contract import Accumulators, CoreFunctions, Factored, Folded, Inputs, Laws, Rule, Sums
from continual.rules.matrices import Include, OnMatrices

Side = Literal["both", "right", "left"]
SIDES: tuple[Side, ...] = ("both", "right", "left")
Grams = Literal["float32", "float64"]
GRAMS: tuple[Grams, ...] = ("float32", "float64")
EARLIER: Mapping[str, Grams] = {"grams": "float64"}
"""How the states were made that do not say how their Grams are kept: whole."""
CROSS, RIGHT, LEFT, SUM = "cross", "right", "left", "sum"
CoreRead = Callable[[Accumulators, tuple[int, int] | None], Tensor]
"""What is read of a matrix; where the accumulators are those of a core, the second are rows and columns of the whole.
"""
Part = Callable[[slice, slice], Tensor]
"""Some rows and columns of a matrix."""
_ROUNDING: Mapping[Grams, float] = {"float32": 1e-4, "float64": 1e-6}
"""Below this share of the weight of a model that was taken out, the trace of a Gram is what rounding left."""
_ROWS = 256
"""Rows of a packed Gram that are added to at a time: enough for a product of matrices, and few enough to stay in cache.
"""


class GramSlots(NamedTuple):
    """What is kept: of which sides, whether S as well, and the Grams in `float32`, packed, or `float64`, whole."""

    side: Side
    total: bool
    grams: Grams

    def slots(self, m: int, n: int) -> dict[str, SlotSpec]:
        """The accumulators of an m×n matrix."""
        found = {CROSS: SlotSpec((m, n), "float64")}
        if self.side != "left":
            found[RIGHT] = self._gram(n)
        if self.side != "right":
            found[LEFT] = self._gram(m)
        return found | ({SUM: SlotSpec((m, n))} if self.total else {})

    def _gram(self, n: int) -> SlotSpec:
        return SlotSpec((n, n), "float64") if self.grams == "float64" else SlotSpec(((n + 1) // 2, n + 1))

    def laws(self) -> Laws:
        """Folding is adding; a state of one of the rules is read by the other where it has all that this one keeps."""
        words = {slot if slot in (CROSS, SUM) else f"{slot} {self.grams}" for slot in self.slots(1, 1)}
        # a model of ten times the weight that counts as rounding is told from it, in every matrix that it changed
        lightest = 10 * _ROUNDING[self.grams]
        return Laws(weighted=True, combine=combine, lightest=lightest, keeps=frozenset(words))

    def rule(self, name: str, include: Include, read: CoreRead, poles: gram_less.Poles | None) -> Rule:
        """The rule that reads these sums by `read`. `poles`: as what function of a Gram that stands where one model is
        left out (`gram_less`); None where it is none. The Grams of cores are whole: they are small, and nobody keeps
        them."""
        mine = tuple(self.slots(1, 1))  # a state of another rule can have more

        def read_whole(accumulators: Accumulators, totals: Totals) -> Tensor:
            return read({slot: _whole(slot, accumulators[slot]) for slot in mine}, None)

        def read_core(accumulators: Accumulators, totals: Totals, sides: tuple[int, int]) -> Tensor:
            return read(accumulators, sides)

        def without(given: Apart) -> LeftOut:
            return gram_less.without(given, poles or (), left=self.side != "right", right=self.side != "left")

        cores = CoreFunctions(self._replace(grams="float64").slots, fold, read_core)
        factored = Factored(cores=cores, without=None if poles is None else without)
        on = OnMatrices(fold, read_whole, workspace, self.slots, factored)
        return matrices.rule(name, include, on, self.laws())


def add_packed(packed: Tensor, part: Part, scale: float) -> None:
    """packed += scale·G, of a symmetric n×n matrix G of which `part` gives pieces, float64; each element rounded once.

    `packed` is its lower triangle, ⌈n/2⌉ × (n + 1) float32: the i-th row from the top, and behind it the i-th from the
    bottom, backwards. Where n is odd the second half of the last row is zeros.
    """
    half, n = len(packed), packed.shape[1] - 1
    for top in range(0, half, _ROWS):
        down = min(top + _ROWS, half)
        found = torch.zeros(down - top, n + 1, dtype=torch.float64, device=packed.device)
        found[:, :down] = part(slice(top, down), slice(0, down)).tril(top)
        down = min(down, n - half)
        below = part(slice(n - down, n - top), slice(0, n - top))
        found[: down - top, top + 1 :] += below.flip(0, 1).triu()
        packed[top : top + len(found)] = found.mul_(scale).add_(packed[top : top + len(found)])


def unpack(packed: Tensor) -> Tensor:
    """The lower triangle of what `add_packed` added up, n×n float64, zeros above it."""
    half, n = len(packed), packed.shape[1] - 1
    found = packed.new_zeros(n, n, dtype=torch.float64)
    found[:half] = packed[:, :n].tril()
    found[half:] = packed[: n - half, 1:].triu().flip(0, 1)
    return found


def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """One matrix of a fine-tune. Where the last model is taken out all sums become exact zeros."""
    folded = fold_matrix(accumulators, tau.flatten(1), inputs.weight)
    if not sums.last_out(totals, inputs.weight):
        return folded
    for value in accumulators.values():
        value.zero_()
    return folded._replace(sums=folded.sums._replace(merged_sq=0.0))


def fold_matrix(accumulators: Accumulators, tau: Tensor, weight: float) -> Folded:
    """Adds weight·τᵀτ/‖τ‖², weight·ττᵀ/‖τ‖², weight·ττᵀτ/‖τ‖² and weight·τ to what is kept of an m×n matrix."""
    cross, exact = accumulators[CROSS], tau.double()
    tau_sq, dot = linalg.dot(tau, tau), float((exact * cross).sum())
    if tau_sq > 0.0:
        scale = weight / tau_sq
        wide = tau.shape[0] <= tau.shape[1]
        inner = exact @ exact.mT if wide else exact.mT @ exact
        cross.add_(inner @ exact if wide else exact @ inner, alpha=scale)
        for side in {RIGHT, LEFT} & accumulators.keys():
            known = inner if (side == LEFT) == wide else None
            _add(accumulators[side], exact if side == LEFT else exact.mT, known, scale)
        if SUM in accumulators:
            accumulators[SUM].add_(tau, alpha=weight)
        if weight < 0 and _none_left(accumulators, -weight):
            for value in accumulators.values():
                value.zero_()
    return Folded(accumulators, Sums(tau_sq, dot, float(cross.square().sum())))


def _add(kept: Tensor, rows: Tensor, gram: Tensor | None, scale: float) -> None:
    """kept += scale·(inner products of `rows`); `gram` are these, where they are known."""
    if kept.dtype == torch.float64:
        kept.add_(rows @ rows.mT if gram is None else gram, alpha=scale)
    else:
        add_packed(kept, lambda one, other: rows[one] @ rows[other].mT if gram is None else gram[one, other], scale)


def _none_left(accumulators: Accumulators, weight: float) -> bool:
    """Whether all that is left is rounding, after a model of this weight was taken out: then it becomes exact zeros.
    Where much lighter models are left none is taken out so (`Laws.lightest`). Each Gram's trace is Σ weight of the
    models that changed this tensor, as exactly as its dtype has it."""
    gram = accumulators[RIGHT if RIGHT in accumulators else LEFT]
    if gram.dtype == torch.float64:
        return float(gram.trace()) < _ROUNDING["float64"] * weight
    trace = float(gram.diagonal().double().sum() + gram[:, 1:].diagonal().double().sum())
    return trace < _ROUNDING["float32"] * weight


def _whole(slot: str, kept: Tensor) -> Tensor:
    return unpack(kept) if slot in (RIGHT, LEFT) and kept.dtype == torch.float32 else kept


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:
    """Adds every statistic; ‖B‖² after, or ‖Στ‖² of what is no matrix."""
    for slot, value in accumulators.items():
        value.add_(others[slot])
    found = accumulators[CROSS if CROSS in accumulators else SUM]
    return linalg.inner(found, found) if found.dtype == torch.float32 else float(found.square().sum())


def workspace(m: int, n: int) -> int:
    """The task vector and a product of it in float64, and a Gram with what decomposing it takes."""
    return 8 * (2 * m * n + 4 * max(m, n) ** 2)


def mean_diagonal(gram: Tensor, whole: int | None) -> float:
    """The mean of a Gram's diagonal; of a core, that of the whole matrix, which has `whole` rows there."""
    found = float(gram.diagonal().mean())
    return found if whole is None else found * (len(gram) / whole)
