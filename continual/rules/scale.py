"""How long the merged task vector is made when it is read, and how its layers are scaled: options that can change
without folding again.

A rule reads what it calls one (the sum, the mean, its own result): X. What is merged is s·(α + β·depth)·c·X, with a
coefficient c of each layer where these were learned; where each model's term in X has one, s is that of X without them.
This module says what s is. It is pure.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import median
from typing import Literal, NamedTuple, TypeGuard, get_args

from continual.errors import Misconfigured
from continual.outside import counted
from continual.records import LARGEST, MatrixTotals, TensorSpec, Totals
from continual.rules.terms import NO_TERMS, TermFactors

Policy = Literal["norm", "number", "spread"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
FEW = 4
"""From so many models on one of them can be told from the others, and `spread` holds it."""
_ROOM = 0.75
"""Between ½ and 1: t vectors of one length have a sum √t times as long at right angles, and t times in one line."""
_HOLD = 1.5
"""The widest with which the mean of four stays within a factor 1.3, whatever one of them is."""
_KEYS = ("policy", "value", "lines", "rule", "weights", "layers", "terms")
_IN_STACK, _EXPERT = re.compile(r"\[\d+\]$"), re.compile(r"(?<=\bexperts)\.\d+\.")
_WRITE = "write spread:C, norm, norm:KAPPA or a number; auto is the rule's default, paper its paper's"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The size of the merged task vector.

    `norm`: as long as `value` (κ) times the mean norm of the folded task vectors; the paper of OPCM is κ = 1. `number`:
    what the rule reads times `value`. `spread`: the matrices are `value`·ρ^1.5 times as long as those of the mean task
    vector, ρ² being the stable rank of the task vectors and ρ^1.5 counting for t^0.75 of t models at the most, and
    everything else is as long as it is in the mean task vector; one model alone is as long as it is; for the rules that
    see matrices (ops/decisions/0014, 0050, 0107).
    `lines` = (α, β) scales each layer by α + β·depth after that, depth being 0 for the first layer and what lies before
    it and 1 for the last (Wang et al. 2024, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
    Merging", equation 3). `rule` names the rule that reads, where it is not the one that the state was made with.
    `weights`: of a state of adapters, keys of models and the weight that each is read with, in place of that of its
    fold; sorted by key. `layers`: what the merged task vector of a layer is multiplied by besides, by `layer_key`;
    sorted; of a layer that is not there it is 1. `terms`: what the term of each model in X of a layer is multiplied by,
    where there are such terms; how long X is made goes by X without them.
    """

    policy: Policy
    value: float = 1.0
    lines: tuple[float, float] | None = None
    rule: str | None = None
    weights: tuple[tuple[str, float], ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    terms: TermFactors = NO_TERMS

    def __post_init__(self) -> None:
        if not _is_number(self.value):
            raise Misconfigured(f"scale: {self.value!r} is no finite number; {_WRITE}")
        if self.policy != "number" and self.value <= 0:
            raise Misconfigured(f"scale = {self.policy}:{self.value:g}: the number has to be above 0")
        if self.lines is not None and not _is_pair(self.lines):
            raise Misconfigured(f"lines = {self.lines!r}: write two numbers, ALPHA:BETA")
        for key, weight in self.weights:
            if not _is_number(weight) or weight <= 0:
                raise Misconfigured(f"weight of {key}: {weight!r} is no number above 0")
        for key, factor in self.layers:
            if not _is_number(factor) or factor <= 0:
                raise Misconfigured(f"coefficient of {key}: {factor!r} is no number above 0")

    def __str__(self) -> str:
        """The text that `parse` reads, the layer scaling where there is one, the rule where it is another, and how many
        models have weights, how many layers coefficients of their own, and in how many each of how many models."""
        lines = f", lines {self.lines[0]:g}:{self.lines[1]:g}" if self.lines else ""
        by = f", read by {self.rule}" if self.rule else ""
        weights = f", weights of {counted(len(self.weights), 'model')}" if self.weights else ""
        layers = f", coefficients of {counted(len(self.layers), 'layer')}" if self.layers else ""
        terms = f", {self.terms}" if self.terms else ""
        return self.scale + lines + by + weights + layers + terms

    @property
    def scale(self) -> str:
        """The text that `parse` reads."""
        return repr(self.value) if self.policy == "number" else f"{self.policy}:{self.value!r}"

    @staticmethod
    def parse_lines(text: str) -> tuple[float, float] | None:
        """`ALPHA:BETA`; `none` is no layer scaling. Raises Misconfigured for anything else."""
        if text.strip() == "none":
            return None
        try:
            alpha, beta = (float(part) for part in text.split(":"))
        except ValueError:
            raise Misconfigured(
                f"lines = {text}: write ALPHA:BETA (a layer is scaled by ALPHA + BETA·depth), or none"
            ) from None
        if max(abs(alpha), abs(beta)) > LARGEST:
            raise Misconfigured(f"lines = {text}: the numbers are at most {LARGEST:g}")
        return alpha, beta

    @staticmethod
    def parse(text: str) -> ReadOptions:
        """`spread:C`, `norm:KAPPA` (each 1 where no number is given) or a number. Raises Misconfigured for anything
        else."""
        word, colon, rest = text.strip().partition(":")
        policy: Policy = next((p for p in POLICIES if p == word), "number")
        if policy != "number" and not colon:
            return ReadOptions(policy, 1.0)
        try:
            found = ReadOptions(policy, float(rest if policy != "number" else text))
        except ValueError:
            raise Misconfigured(f"scale = {text}: {_WRITE}") from None
        if abs(found.value) > LARGEST:
            raise Misconfigured(f"scale = {text}: the number is at most {LARGEST:g}")
        return found

    @staticmethod
    def from_mapping(options: Mapping[str, object]) -> ReadOptions:
        """The inverse of `to_mapping`. Raises Misconfigured for unknown or missing keys, or a value that is not
        allowed."""
        if not {"policy", "value"} <= set(options) <= {*_KEYS}:
            raise Misconfigured(
                "scale: expected the keys policy, value and perhaps lines, rule, weights, layers and terms, "
                f"got {', '.join(sorted(options)) or 'none'}"
            )
        policy = next((known for known in POLICIES if known == options["policy"]), None)
        value, lines, by = options["value"], options.get("lines"), options.get("rule")
        if policy is None:
            raise Misconfigured(f"scale: unknown policy {options['policy']!r}; {_WRITE}")
        if not _is_number(value):
            raise Misconfigured(f"scale: {value!r} is no finite number; {_WRITE}")
        if lines is not None and not _is_pair(lines):
            raise Misconfigured(f"lines = {lines!r}: write two numbers, ALPHA:BETA")
        if by is not None and not isinstance(by, str):
            raise Misconfigured(f"scale: rule = {by!r} is no rule's name")
        weights, layers = (_table(key, options.get(key, {})) for key in ("weights", "layers"))
        terms, pair = TermFactors.from_mapping(options.get("terms")), None if lines is None else (lines[0], lines[1])
        return ReadOptions(policy, value, pair, by, weights, layers, terms)

    def to_mapping(self) -> dict[str, object]:
        """Plain data, as it is kept in the state."""
        lines = {"lines": list(self.lines)} if self.lines else {}
        weights = {"weights": dict(self.weights)} if self.weights else {}
        rule = {"rule": self.rule} if self.rule else {}
        layers = {"layers": dict(self.layers)} if self.layers else {}
        terms = {"terms": self.terms.to_mapping()} if self.terms else {}
        return {"policy": self.policy, "value": self.value, **lines, **rule, **weights, **layers, **terms}

    def layer(self, spec: TensorSpec) -> float:
        """What a tensor is scaled by besides: by its depth, and by the coefficient of its layer."""
        factor = self.lines[0] + self.lines[1] * spec.depth if self.lines else 1.0
        if not self.layers:
            return factor
        key = layer_key(spec.name)
        place = bisect_left(self.layers, key, key=itemgetter(0))
        found = place < len(self.layers) and self.layers[place][0] == key
        return factor * self.layers[place][1] if found else factor

    def factors(self, totals: Totals, size: Size) -> ScaleFactors:
        """s for the matrices, everything else, and what sees pixels: one number, but under `spread`. `size` has to have
        what the policy `needs`.

        `norm`: s = min(κ, t)·n̄/‖X‖ with n̄ the mean of ‖τ_1‖ … ‖τ_t‖, held at max(`size.most`, n̄/‖X‖): κ = 1 is the
        paper's law exactly; a larger κ makes the merged task vector no longer than all task vectors end to end, or than
        the plain sum where X is one.
        `spread`: c·min(ρ^1.5, t^0.75)·n̄/‖X‖ over the matrices, n̄/‖X‖ of one model alone: nothing gets in its way.
        n̄/‖X‖, but no more than what makes it the plain sum, over the rest; of what sees pixels the mean, where that is
        shorter. From `FEW` models on all lengths are means of what each model has, ρ_i^1.5·‖τ_i‖ and ‖τ_i‖, `held` near
        the median: one odd model hardly changes them. Not where `totals` do not have each model's: the records of some
        folds are older.
        """
        if self.policy == "number":
            return ScaleFactors(self.value, self.value, self.value)
        count = totals.count
        if count <= 0:
            return ScaleFactors(0.0, 0.0, 0.0)
        if self.policy == "norm":
            assert size.length is not None
            paper = _ratio(totals.norm_sum / count, size.length)
            found = min(min(self.value, max(1.0, count)) * paper, max(size.most, paper))
            return ScaleFactors(found, found, found)
        if totals.matrices is None:
            raise Misconfigured(
                "scale = spread: what is folded here was folded before continual measured what it takes; "
                "use norm or a number"
            )
        assert size.parts is not None
        matrices, rest = size.parts
        if len(totals.each) == count >= FEW:
            long, norm = (held([of(model) for model in totals.each]) for of in (_length, _norm))
            plain = held([model.plain_norm_sum for model in totals.each])
        else:
            long, norm = (of(totals.matrices) / count for of in (_length, _norm))
            plain = totals.matrices.plain_norm_sum / count
        longer = self.value * min(long, count**_ROOM * norm) if count > 1 else norm
        others = min(_ratio(plain, rest), size.most)
        mean = size.most / totals.weight if totals.weight > 0 else math.inf
        return ScaleFactors(_ratio(longer, matrices), others, min(others, mean))

    def needs(self, size: Size) -> bool:
        """Whether `size` lacks something that this policy takes: X has to be read to know it."""
        return (self.policy == "norm" and size.length is None) or (self.policy == "spread" and size.parts is None)


def layer_key(name: str) -> str:
    """The name under which a tensor has a coefficient: its own, but one for all experts of a layer, whether they lie in
    a stack (`NAME[3]` is of NAME) or one by one (`experts.3.` is of `experts.*.`)."""
    return _EXPERT.sub(".*.", _IN_STACK.sub("", name))


class ScaleFactors(NamedTuple):
    """What X is multiplied by: of the matrices, of everything else, and of what sees pixels."""

    matrices: float
    rest: float
    pixels: float

    def of(self, spec: TensorSpec, *, matrix: bool) -> float:
        """What X of this tensor is multiplied by, which the rule takes for a `matrix` or not."""
        return self.matrices if matrix else self.pixels if spec.pixels else self.rest


class Size(NamedTuple):
    """How long X is over the whole model, and the multiple of X that is the plain sum of the task vectors if one is.

    `length`: ‖X‖, None where X has to be read for that. `parts`: the same over the matrices, and over everything else.
    """

    length: float | None = None
    most: float = math.inf
    parts: tuple[float, float] | None = None


def held(values: Sequence[float]) -> float:
    """The mean of `values`, each held within a factor of their median (ops/decisions/0052). Where the median is 0,
    the mean."""
    middle = median(values)
    inside = [min(max(value, middle / _HOLD), middle * _HOLD) for value in values] if middle else values
    return math.fsum(inside) / len(values)


def _length(figures: MatrixTotals) -> float:
    """ρ^1.5·‖τ‖ over the matrices, of one model, or of all of them end to end with the mean ρ."""
    norm = figures.matrix_norm_sum
    return (figures.spread_sum / norm) ** 1.5 * norm if norm else 0.0


def _norm(figures: MatrixTotals) -> float:
    """‖τ‖ over the matrices, of one model, or of all of them end to end."""
    return figures.matrix_norm_sum


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def _table(key: str, found: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(found, Mapping) or not all(_is_number(value) for value in found.values()):
        raise Misconfigured(f"scale: {key} = {found!r} is no table of numbers")
    return tuple((str(name), float(value)) for name, value in sorted(found.items()))


def _is_pair(value: object) -> TypeGuard[Sequence[float]]:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(part) for part in value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
