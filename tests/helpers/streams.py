"""A rule driven as the engine does, on small models of every shape: what the property tests of the rules share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from continual.records import TensorSpec, Totals
from continual.rules import RULES, Inputs, Pass, Rule, Sums, read_options, rule, settle
from tests.helpers import batch

SHAPES = {
    "tall": (24, 9),
    "wide": (8, 21),
    "square": (12, 12),
    "conv": (10, 3, 2, 2),
    "stack": (3, 4, 5),
    "bias": (11,),
    "scalar": (),
    "empty": (0, 4),
}
MATRICES = {"tall", "wide", "square", "conv"}
SPECS = {n: TensorSpec(n, s, "F32", "matrix" if n in MATRICES else "plain") for n, s in SHAPES.items()}
Model = dict[str, Tensor]
READINGS = {
    "tsv-even": "tsv-m",
    "tsv-u": "tsv-m",
    "tsv-w": "tsv-m",
    "isotropic": "tsv-m",
    "esm": "tsv-m",
    "dc": "tsv-m",
    "iso-cts": "tsv-m",
    "tsv-flow": "tsv-m",
    "flow": "gram",
}
"""Rules that read what another keeps, and fold as it does. What is asked of a fold is asked of that one."""
FOLDING = [name for name in RULES if name not in READINGS]
"""Rules with a fold of their own."""
RUN = 48
"""Elements of a run: several in each matrix, so that the last one is shorter."""


def measure(made: Rule, model: Model) -> object:
    """What the passes before a fold find out, made as the engine makes them: over the tensors that the model changes,
    in runs, or in the beginning of each run."""
    found: object = made.needs.measure
    numel = sum(tau.numel() for tau in model.values())
    while isinstance(found, Pass):
        counts = np.zeros(found.bins, np.int64)
        for name, tau in model.items():
            inputs = Inputs(SPECS[name], seed=batch.seed_of(name, tau), measured=found)
            for number, run in enumerate(tau.clone().reshape(-1).split(RUN) if tau.any() else ()):
                seen = run[: max(1, int(found.share * len(run)))]
                found.tally(seen, inputs._replace(start=RUN * number), counts, round(len(run) / len(seen)))
        found = found.conclude(counts, numel)
    return found


class Stream:
    """A rule driven as the engine does, tensors in any order."""

    def __init__(self, name: str, **options: object) -> None:
        self.name, self.rule, self.options = name, rule(name, options), read_options(name, "paper")
        self.totals = Totals()
        self.kept = {
            n: {slot: torch.from_numpy(np.zeros(s.shape, s.dtype)) for slot, s in self.rule.slots(spec).items()}
            for n, spec in SPECS.items()
        }

    def fold(self, model: Model, weight: float = 1.0, order: Sequence[str] = tuple(SHAPES)) -> None:
        sums: dict[str, Sums] = {}
        measured = measure(self.rule, model)
        for name in order:
            tau = model[name]
            moments = batch.moments_of(tau) if self.rule.needs.shipped else None
            inputs = Inputs(SPECS[name], weight, batch.seed_of(name, tau), measured, moments=moments)
            folded = self.rule.fold.apply(self.kept[name], tau.clone(), inputs, self.totals)
            sums[name] = folded.sums
            # what is untouched keeps its files: a zero task vector must change nothing
            self.kept[name] = folded.accumulators
        self.totals = settle(self.totals, Sums.total(list(sums.values())), weight)

    def read(self) -> Model:
        """The merged task vector at the scale of the rule's paper."""
        found = {n: self.rule.read.unit(SPECS[n], self.kept[n], self.totals) for n in SHAPES}
        factor = self.options.factors(self.totals, self.rule.read.size(self.totals))[0]
        found = {n: x.mul_(factor) for n, x in found.items()}
        assert all(t.dtype == torch.float32 and t.shape == SHAPES[n] for n, t in found.items())
        return found


class Models(list[Model]):
    """Fine-tunes that are printed by how they were made, not by their values."""

    made = ""

    def __repr__(self) -> str:
        return self.made


@st.composite
def model_lists(draw: st.DrawFn) -> Models:
    """Up to five fine-tunes: dense ones, of low rank like adapters, ones that leave tensors alone, and twins."""
    seed = draw(st.integers(0, 10_000))
    kinds = draw(st.lists(st.sampled_from(["dense", "low-rank", "partial", "twin"]), min_size=1, max_size=5))
    random = torch.Generator().manual_seed(seed)
    found = Models()
    found.made = f"models({seed}, {kinds})"
    for kind in kinds:
        if kind == "twin" and found:
            found.append(found[-1])
            continue
        model = {}
        for name, shape in SHAPES.items():
            tau = 0.01 * torch.randn(shape, generator=random)
            if kind == "low-rank" and name in MATRICES:
                rows, columns = shape[0], tau.numel() // shape[0]
                tau = (
                    0.02 * torch.randn(rows, 2, generator=random) @ torch.randn(2, columns, generator=random)
                ).reshape(shape)
            if kind == "partial" and name in ("tall", "conv", "bias"):
                tau = torch.zeros(shape)
            model[name] = tau
        found.append(model)
    return found


def distance(found: Tensor, expected: Tensor, given: Sequence[Tensor] = ()) -> float:
    """Frobenius distance relative to the larger of what is expected and of the task vectors `given`: where these
    cancel, float32 leaves their rounding."""
    length = max(float(tensor.double().norm()) for tensor in (expected, *given))
    return float((found.double() - expected.double()).norm()) / length if length else float(found.double().norm())


def bound(name: str, folded: Sequence[Tensor] = ()) -> float:
    """1e-5, and where a rule's result is no smoother function of the float32 state than that, what the state allows.

    opcm 1e-4: which directions lie in the block is as sharp as the gap between two singular values, and those of twins
    can be close. iso-c and tsv-m: a polar factor moves by the rounding over the smallest singular value that it keeps.
    """
    if name == "opcm":
        return 1e-4
    return (
        max(1e-5, 1e-7 * max((batch.condition(part) for part in batch.POLAR[name](folded)), default=1.0))
        if name in batch.POLAR
        else 1e-5
    )
