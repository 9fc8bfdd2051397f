"""What a rule is: pure functions over one tensor's accumulators and the model's totals. No rule lives here, and no registry.

A rule never sees a file, a clock, a device of its own choice or global random state. `fold` and `read` work on the device of the tensors they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from continual.errors import Misconfigured
from continual.records import SlotSpec, TensorSpec

Accumulators = dict[str, torch.Tensor]
"""What a rule keeps of one tensor, by slot name: fixed shapes and dtypes from the first fold on, zeros before it."""
Totals = Mapping[str, float]
"""What a rule keeps of the whole model; empty before the first fold."""
Sums = Mapping[str, float]
"""What one tensor adds to the whole model's figures; reduced over tensors in float64 in name order."""


Measured = Mapping[str, float]
"""What a rule found out about the whole model before folding it."""


class Inputs(NamedTuple):
    """What a fold is given besides the task vector: `weight` (minus the weight it was folded with unfolds a model), `seed` for random choices (from the
    tensor's content and name), what was measured in the passes before the fold, where in the tensor a run begins, and what was shipped beside the weights
    for it (`moments`: float32 of τ's shape, not negative)."""

    spec: TensorSpec
    weight: float = 1.0
    seed: int = 0
    measured: Measured = MappingProxyType({})
    start: int = 0
    moments: torch.Tensor | None = None


class Measure(NamedTuple):
    """Passes over all task vectors of a model before it is folded.

    share(pass, measured so far): of which share of the elements the pass has to see: 0 leaves it out, below 1 a sample spread over every tensor will do.
    tally(pass, flat run of τ, inputs with what is measured so far): int64 counts of a fixed length, which are added up over the model; those of
    a sample are multiplied first by how many elements each stands for.
    conclude(pass, counts, number of elements of the model, measured so far): what is measured after the pass. The elements of tensors that the model
    leaves alone are zeros that were not counted.
    """

    passes: int
    share: Callable[[int, Measured], float]
    tally: Callable[[int, torch.Tensor, Inputs], torch.Tensor]
    conclude: Callable[[int, torch.Tensor, int, Measured], dict[str, float]]

    @property
    def usual(self) -> float:
        """How often the elements are seen as a rule: where no pass finds that another is needed."""
        return sum(self.share(number, {}) for number in range(self.passes))


class Folded(NamedTuple):
    """One tensor after a fold. `sums`: tau_sq ‖τ‖², dot ⟨τ, X_old⟩, merged_sq ‖X_new‖². `notes` are reported only."""

    accumulators: Accumulators
    sums: dict[str, float]
    notes: dict[str, float]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The size of the merged task vector, chosen when it is read.

    `norm`: as long as `value` (κ) times the mean norm of the folded task vectors; the paper of OPCM is κ = 1. `number`: the rule's own sum (or mean)
    times `value`. `lines` = (α, β) scales each layer by α + β·depth after that, depth being 0 for the first layer and what lies before it and 1 for the last
    (Wang et al. 2024, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", equation 3).
    """

    policy: Literal["norm", "number"]
    value: float = 1.0
    lines: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.policy not in ("norm", "number"):
            raise Misconfigured(f"scale: unknown policy {self.policy!r}; write norm, norm:KAPPA or a number")
        if not _is_number(self.value):
            raise Misconfigured(f"scale: {self.value!r} is no finite number; write norm, norm:KAPPA or a number")
        if self.policy == "norm" and self.value <= 0:
            raise Misconfigured(f"scale = norm:{self.value:g}: KAPPA has to be above 0")
        if self.lines is not None and not (len(self.lines) == 2 and all(_is_number(part) for part in self.lines)):
            raise Misconfigured(f"lines = {self.lines!r}: write two numbers, ALPHA:BETA")

    def __str__(self) -> str:
        """The text that `parse` reads, and the layer scaling where there is one."""
        scale = f"norm:{self.value!r}" if self.policy == "norm" else repr(self.value)
        return scale + (f", lines {self.lines[0]:g}:{self.lines[1]:g}" if self.lines else "")

    @staticmethod
    def parse_lines(text: str) -> tuple[float, float] | None:
        """`ALPHA:BETA`; `none` is no layer scaling. Raises Misconfigured for anything else."""
        if text.strip() == "none":
            return None
        try:
            alpha, beta = (float(part) for part in text.split(":"))
        except ValueError:
            raise Misconfigured(f"lines = {text}: write ALPHA:BETA (a layer is scaled by ALPHA + BETA·depth), or none") from None
        return alpha, beta

    @staticmethod
    def parse(text: str) -> ReadOptions:
        """`norm`, `norm:KAPPA` or a number. Raises Misconfigured for anything else."""
        word, colon, rest = text.strip().partition(":")
        policy: Literal["norm", "number"] = "norm" if word == "norm" else "number"
        if text.strip() == "norm":
            return ReadOptions("norm", 1.0)
        try:
            value = float(rest if policy == "norm" and colon else text)
        except ValueError:
            raise Misconfigured(f"scale = {text}: write norm, norm:KAPPA or a number") from None
        return ReadOptions(policy, value)

    @staticmethod
    def from_mapping(options: Mapping[str, Any]) -> ReadOptions:
        """The inverse of `to_mapping`. Raises Misconfigured for unknown or missing keys."""
        if not {"policy", "value"} <= set(options) <= {"policy", "value", "lines"}:
            raise Misconfigured(f"scale: expected the keys policy, value and perhaps lines, got {', '.join(sorted(options)) or 'none'}")
        lines = options.get("lines")
        return ReadOptions(options["policy"], options["value"], None if lines is None else tuple(lines))

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, as it is kept in the state."""
        return {"policy": self.policy, "value": self.value} | ({"lines": list(self.lines)} if self.lines else {})

    def layer(self, spec: TensorSpec) -> float:
        """What a tensor of this depth is scaled by besides."""
        return self.lines[0] + self.lines[1] * spec.depth if self.lines else 1.0

    def factor(self, totals: Totals, unit: float = 1.0) -> float:
        """s in merged = s·X. `unit` is what the policy `number` multiplies (1/Σw for a mean).

        For `norm`, s = κ·n̄/‖X‖ with n̄ the mean of ‖τ_1‖ … ‖τ_t‖; for κ > 1 it is held at max(1, n̄/‖X‖), so that one model (or models that hardly
        interfere) are never blown up beyond their own sum. At κ = 1 this is the paper's law exactly.
        """
        if self.policy == "number":
            return self.value * unit
        length = math.sqrt(totals.get("merged_sq", 0.0))
        if length == 0.0 or totals.get("count", 0.0) <= 0:
            return 0.0
        paper = totals["norm_sum"] / totals["count"] / length
        return min(max(1.0, paper), self.value * paper)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Rule(NamedTuple):
    """A fold rule with its fold-time options resolved.

    slots(spec): the accumulators of a tensor, which start as zeros; not asked for carried tensors.
    elementwise(spec): `fold` may be given any run of elements in place of the whole tensor, flat; the accumulators then have the tensor's shape.
    fold(accumulators, τ, inputs, totals before): may overwrite the accumulators and τ in place; τ is float32 of the tensor's shape.
    settle(totals before, sums, weight): totals after.
    read(spec, accumulators, totals, options): the merged task vector, float32, in new memory.
    workspace(spec): peak bytes that fold needs beyond the accumulators and τ.
    gauges(totals): figures worth watching, by name (λ of opcm).
    combine(accumulators, others, totals of both together): adds the others' to the accumulators in place, returns ‖X‖². Where a rule has it, folding is
    adding: two states become one, and folding again with minus the weight unfolds.
    measure: what has to be known of a whole model before any of it is folded.
    seeded: `fold` makes random choices, by `inputs.seed`. weighted: a model can be folded with any weight above 0.
    shipped: the file beside the weights that `inputs.moments` comes from; a tensor whose τ is zero is folded then like any other.
    """

    name: str
    summary: str
    options: Mapping[str, Any]
    slots: Callable[[TensorSpec], dict[str, SlotSpec]]
    elementwise: Callable[[TensorSpec], bool]
    fold: Callable[[Accumulators, torch.Tensor, Inputs, Totals], Folded]
    settle: Callable[[Totals, Sums, float], dict[str, float]]
    read: Callable[[TensorSpec, Accumulators, Totals, ReadOptions], torch.Tensor]
    workspace: Callable[[TensorSpec], int]
    gauges: Callable[[Totals], dict[str, float]]
    combine: Callable[[Accumulators, Accumulators, Totals], float] | None = None
    measure: Measure | None = None
    seeded: bool = False
    weighted: bool = False
    shipped: str | None = None


class Option(NamedTuple):
    """A fold-time option: `check` returns the value in its canonical form or raises ValueError with what is allowed."""

    default: Any
    help: str
    check: Callable[[Any], Any]


class Row(NamedTuple):
    """A rule in the registry: what it is, its options, how it is read unless told otherwise; `make` gets all options, checked.

    bytes_per_parameter: size of its state, for people. order_free: the order of the fine-tunes does not matter beyond rounding.
    policies: the read-time scales it knows.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]
    read: ReadOptions
    bytes_per_parameter: str
    make: Callable[[Mapping[str, Any]], Rule]
    order_free: bool = True
    policies: tuple[str, ...] = ("norm", "number")


def resolve(what: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options with their values; those not given take their defaults. Raises Misconfigured for unknown ones, or a value that is not allowed."""
    for unknown in sorted(set(given) - set(options)):
        raise Misconfigured(f"{what}: unknown option {unknown!r}; its options are: {', '.join(sorted(options)) or 'none'}")
    resolved = {}
    for key, option in options.items():
        try:
            resolved[key] = option.check(given.get(key, option.default))
        except ValueError as error:
            raise Misconfigured(f"{what}: {key} = {given[key]!r} has to be {error}") from None
    return resolved
