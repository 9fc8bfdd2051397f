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
    """What a fold is given besides the task vector: `weight` (minus the weight it was folded with unfolds a model), `seed` for random choices, and what
    was measured in the passes before the fold."""

    spec: TensorSpec
    weight: float = 1.0
    seed: int = 0
    measured: Measured = MappingProxyType({})


class Measure(NamedTuple):
    """Passes over all task vectors of a model before it is folded.

    tally(pass, flat run of τ, measured so far): int64 counts of a fixed length, which are added up over the model.
    conclude(pass, counts, number of elements of the model, measured so far): what is measured after the pass. The elements of tensors that the model
    leaves alone are zeros that were not counted.
    """

    passes: int
    tally: Callable[[int, torch.Tensor, Measured], torch.Tensor]
    conclude: Callable[[int, torch.Tensor, int, Measured], dict[str, float]]


class Folded(NamedTuple):
    """One tensor after a fold. `sums`: tau_sq ‖τ‖², dot ⟨τ, X_old⟩, merged_sq ‖X_new‖². `notes` are reported only."""

    accumulators: Accumulators
    sums: dict[str, float]
    notes: dict[str, float]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The size of the merged task vector, chosen when it is read.

    `norm`: as long as `value` (κ) times the mean norm of the folded task vectors; the paper of OPCM is κ = 1. `number`: the rule's own sum (or mean)
    times `value`.
    """

    policy: Literal["norm", "number"]
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.policy not in ("norm", "number"):
            raise Misconfigured(f"scale: unknown policy {self.policy!r}; write norm, norm:KAPPA or a number")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise Misconfigured(f"scale: {self.value!r} is no finite number; write norm, norm:KAPPA or a number")
        if self.policy == "norm" and self.value <= 0:
            raise Misconfigured(f"scale = norm:{self.value:g}: KAPPA has to be above 0")

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"norm:{self.value!r}" if self.policy == "norm" else repr(self.value)

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
        if set(options) != {"policy", "value"}:
            raise Misconfigured(f"scale: expected the keys policy and value, got {', '.join(sorted(options)) or 'none'}")
        return ReadOptions(options["policy"], options["value"])

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, as it is kept in the state."""
        return {"policy": self.policy, "value": self.value}

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


class Rule(NamedTuple):
    """A fold rule with its fold-time options resolved.

    slots(spec): the accumulators of a tensor, which start as zeros; not asked for carried tensors.
    elementwise(spec): `fold` may be given any run of elements in place of the whole tensor, flat; the accumulators then have the tensor's shape.
    fold(accumulators, τ, inputs, totals before): may overwrite the accumulators and τ in place; τ is float32 of the tensor's shape.
    settle(totals before, sums, weight): totals after.
    read(spec, accumulators, totals, options): the merged task vector, float32, in new memory.
    workspace(spec): peak bytes that fold needs beyond the accumulators and τ.
    gauges(totals): figures worth watching, by name (λ of opcm).
    group: folding is adding, so folding again with minus the weight unfolds.
    measure: what has to be known of a whole model before any of it is folded.
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
    group: bool
    measure: Measure | None = None


class Option(NamedTuple):
    """A fold-time option: `check` returns the value in its canonical form or raises ValueError with what is allowed."""

    default: Any
    help: str
    check: Callable[[Any], Any]


class Row(NamedTuple):
    """A rule in the registry: what it is, its options, how it is read unless told otherwise; `make` gets all options, checked.

    bytes_per_parameter: size of its state, for people. order_free: the order of the fine-tunes does not matter beyond rounding. group: see Rule.
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
