"""How long the merged task vector is made when it is read, and how its layers are scaled: options that can change without folding again.

A rule reads what it calls one (the sum, the mean, its own result): X. What is merged is s·(α + β·depth)·X; this module says what s is. It is pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from continual.errors import Misconfigured
from continual.records import TensorSpec

POLICIES = ("norm", "number")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The size of the merged task vector.

    `norm`: as long as `value` (κ) times the mean norm of the folded task vectors; the paper of OPCM is κ = 1. `number`: what the rule reads times
    `value`. `lines` = (α, β) scales each layer by α + β·depth after that, depth being 0 for the first layer and what lies before it and 1 for the last
    (Wang et al. 2024, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", equation 3).
    """

    policy: Literal["norm", "number"]
    value: float = 1.0
    lines: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise Misconfigured(f"scale: unknown policy {self.policy!r}; write norm, norm:KAPPA or a number")
        if not _is_number(self.value):
            raise Misconfigured(f"scale: {self.value!r} is no finite number; write norm, norm:KAPPA or a number")
        if self.policy == "norm" and self.value <= 0:
            raise Misconfigured(f"scale = norm:{self.value:g}: KAPPA has to be above 0")
        if self.lines is not None and not (len(self.lines) == 2 and all(_is_number(part) for part in self.lines)):
            raise Misconfigured(f"lines = {self.lines!r}: write two numbers, ALPHA:BETA")

    def __str__(self) -> str:
        """The text that `parse` reads, and the layer scaling where there is one."""
        return self.scale + (f", lines {self.lines[0]:g}:{self.lines[1]:g}" if self.lines else "")

    @property
    def scale(self) -> str:
        """The text that `parse` reads."""
        return f"norm:{self.value!r}" if self.policy == "norm" else repr(self.value)

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

    def factor(self, totals: Mapping[str, float], length: float, most: float = math.inf) -> float:
        """s, of totals that have count and norm_sum, for ‖X‖ = `length` and the `most` that X may be multiplied by beyond the paper's law.

        For `norm`, s = min(κ, t)·n̄/‖X‖ with n̄ the mean of ‖τ_1‖ … ‖τ_t‖, held at max(`most`, n̄/‖X‖): κ = 1 is the paper's law exactly; a larger κ makes
        the merged task vector no longer than all task vectors end to end, or than the plain sum where X is one.
        """
        if self.policy == "number":
            return self.value
        count = totals.get("count", 0.0)
        if length == 0.0 or count <= 0:
            return 0.0
        paper = totals["norm_sum"] / count / length
        return min(min(self.value, max(1.0, count)) * paper, max(most, paper))


class Size(NamedTuple):
    """‖X‖ over the whole model, None where X has to be read for that; and the multiple of X that is the plain sum of the task vectors, if one is."""

    length: float | None = None
    most: float = math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
