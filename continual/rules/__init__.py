"""The merge rules: pure functions on torch tensors. This module holds their interface and the registry; each rule has a module of its own.

A rule keeps accumulators of constant size per tensor and a few totals per model. `fold` takes one task vector into the accumulators, `settle` the
sums over all tensors into the totals, `read` gives the merged task vector. No file, clock, device move or global random state here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from continual.errors import Misconfigured
from continual.records import SlotSpec, TensorSpec

Accumulators = dict[str, Tensor]
Totals = Mapping[str, float]
Sums = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How large the merged task vector is made when it is read; it can change without folding again.

    `norm`: s = min(max(1, n̄/‖X‖), κ·n̄/‖X‖) for the direction X with the mean task-vector norm n̄ and κ = `value`; κ = 1 is OPCM's own law.
    `number`: s = `value`.
    """

    policy: Literal["norm", "number"] = "number"
    value: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ReadOptions:
        """`norm`, `norm:2.45` or `0.3`. Raises Misconfigured for anything else."""
        word, colon, rest = text.partition(":")
        try:
            value = float(rest) if colon else 1.0 if word == "norm" else float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value <= 0 or (colon and word != "norm"):
            raise Misconfigured(f"scale {text!r}: use norm, norm:KAPPA or a positive number")
        return cls("norm" if word == "norm" else "number", value)

    @classmethod
    def from_mapping(cls, body: Mapping[str, Any]) -> ReadOptions:
        """From what `to_mapping` gave."""
        return cls(body["policy"], float(body["value"]))

    def to_mapping(self) -> dict[str, Any]:
        """As a commit record keeps it."""
        return {"policy": self.policy, "value": self.value}

    def __str__(self) -> str:
        return f"norm:{self.value:g}" if self.policy == "norm" else f"{self.value:g}"


class Inputs(NamedTuple):
    """What comes with a task vector. `weight` multiplies it; −1 unfolds where the rule is a group."""

    spec: TensorSpec
    weight: float = 1.0


class Folded(NamedTuple):
    """What a fold of one tensor gave: `sums` are added up over the model in float64, in name order; `notes` are only reported."""

    accumulators: Accumulators
    sums: dict[str, float]
    notes: dict[str, float]


class Rule(NamedTuple):
    """One merge rule with its fold-time options resolved.

    `slots`: shapes and dtypes of the accumulators of a tensor; they start as zeros. `fold` may overwrite the accumulators and the task vector it is
    given; a task vector of zeros leaves the accumulators as they are. `workspace`: peak bytes that `fold` needs beyond both.
    Every fold gives the sums `tau_sq` (‖τ‖²), `before_sq` and `merged_sq` (‖X‖² before and after, X being the rule's direction), `dot` (⟨τ, X⟩ before).
    """

    name: str
    options: Mapping[str, Any]
    slots: Callable[[TensorSpec], dict[str, SlotSpec]]
    fold: Callable[[Accumulators, Tensor, Inputs, Totals], Folded]
    settle: Callable[[Totals, Sums, float], dict[str, float]]
    read: Callable[[TensorSpec, Accumulators, Totals, ReadOptions], Tensor]
    gauges: Callable[[Totals], dict[str, float]]
    workspace: Callable[[TensorSpec], int]
    group: bool


class Option(NamedTuple):
    """A fold-time option: its default, what it must satisfy, and how to say so."""

    default: Any
    accepts: Callable[[Any], bool]
    says: str


class Row(NamedTuple):
    """A rule's row in the registry."""

    make: Callable[[Mapping[str, Any]], Rule]
    summary: str
    source: str
    options: Mapping[str, Option]
    read: ReadOptions


def settle(totals: Totals, sums: Sums, weight: float) -> dict[str, float]:
    """The totals every rule keeps: `count` and `weight` of what is in, `norm_sum` = Σ‖τ_i‖ over whole models, `merged_sq` = ‖X‖².

    Where the count returns to 0 all are exactly 0.
    """
    count = totals.get("count", 0.0) + math.copysign(1.0, weight)
    if count == 0.0:
        return {"count": 0.0, "weight": 0.0, "norm_sum": 0.0, "merged_sq": 0.0}
    return {
        "count": count,
        "weight": totals.get("weight", 0.0) + weight,
        "norm_sum": totals.get("norm_sum", 0.0) + math.copysign(math.sqrt(sums["tau_sq"]), weight),
        "merged_sq": sums["merged_sq"],
    }


def mean_norm(totals: Totals) -> float:
    """n̄: the plain mean of ‖τ_1‖ … ‖τ_t‖; 0 before the first fold."""
    return totals["norm_sum"] / totals["count"] if totals.get("count") else 0.0


def scale_of(totals: Totals, read: ReadOptions) -> float:
    """The factor s by which the rule's direction X is read; 0 before the first fold."""
    if not totals.get("count"):
        return 0.0
    if read.policy == "number":
        return read.value
    norm = math.sqrt(totals["merged_sq"])
    paper = mean_norm(totals) / norm if norm else 0.0
    return min(max(1.0, paper), read.value * paper)


from continual.rules import opcm, sums  # noqa: E402  the rules import the interface above

RULES: Mapping[str, Row] = {
    "opcm": Row(
        opcm.make,
        "orthogonal projection of each task vector against what was merged, with an adaptive scale",
        "Tang et al. 2025, Merging Models on the Fly Without Retraining",
        {
            "alpha": Option(0.5, lambda v: isinstance(v, (int, float)) and 0 <= v < 1, "a number in [0, 1)"),
            "variant": Option("block", lambda v: v in opcm.VARIANTS, f"one of {', '.join(opcm.VARIANTS)}"),
            "include": Option([], lambda v: isinstance(v, list) and all(isinstance(g, str) for g in v), "a list of globs"),
        },
        ReadOptions("norm", 1.0),
    ),
    "mean": Row(sums.mean, "plain average of the task vectors", "Wortsman et al. 2022, Model soups", {}, ReadOptions("number", 1.0)),
    "task-arithmetic": Row(
        sums.task_arithmetic, "sum of the task vectors, scaled", "Ilharco et al. 2023, Editing Models with Task Arithmetic", {}, ReadOptions("number", 0.3)
    ),
}


def rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with `options` over its defaults. Raises Misconfigured naming an unknown rule or option, or a value that does not fit."""
    row = _row(name)
    resolved = {key: option.default for key, option in row.options.items()}
    for key, value in (options or {}).items():
        if key not in row.options:
            known = ", ".join(row.options) or "none"
            raise Misconfigured(f"rule {name}: unknown option {key!r}; it has {known}")
        if not row.options[key].accepts(value):
            raise Misconfigured(f"rule {name}: {key} = {value!r} must be {row.options[key].says}")
        resolved[key] = value
    return row.make(resolved)


def default_read(name: str) -> ReadOptions:
    """The read-time options a state of this rule begins with."""
    return _row(name).read


def _row(name: str) -> Row:
    if name not in RULES:
        raise Misconfigured(f"unknown rule {name!r}: use one of {', '.join(RULES)}")
    return RULES[name]
