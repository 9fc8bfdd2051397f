"""What a rule is: pure functions over one tensor's accumulators and the model's totals. No rule lives here, and no
registry.

A rule never sees a file, a clock, a device of its own choice or global random state. `fold` and `read` work on the
device of the tensors they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from continual.errors import Misconfigured
from continual.records import SlotSpec, TensorSpec
from continual.rules.scale import ReadOptions, Size

Accumulators = dict[str, torch.Tensor]
"""What a rule keeps of one tensor, by slot name: fixed shapes and dtypes from the first fold on, zeros before it."""
Totals = Mapping[str, float]
"""What a rule keeps of the whole model; empty before the first fold."""
Sums = Mapping[str, float]
"""What one tensor adds to the whole model's figures; reduced over tensors in float64 in name order."""


Measured = Mapping[str, float]
"""What a rule found out about the whole model before folding it."""


class Inputs(NamedTuple):
    """What a fold is given besides the task vector: `weight` (minus the weight it was folded with unfolds a model),
    `seed` for random choices (from the tensor's content and name), what was measured in the passes before the fold,
    where in the tensor a run begins, and what was shipped beside the weights for it (`moments`: float32 of τ's shape,
    not negative)."""

    spec: TensorSpec
    weight: float = 1.0
    seed: int = 0
    measured: Measured = MappingProxyType({})
    start: int = 0
    moments: torch.Tensor | None = None


class Measure(NamedTuple):
    """Passes over all task vectors of a model before it is folded.

    share(pass, measured so far): of which share of the elements the pass has to see: 0 leaves it out, below 1 a sample
    spread over every tensor will do. tally(pass, flat run of τ, inputs with what is measured so far): int64 counts of a
    fixed length, which are added up over the model; those of a sample are multiplied first by how many elements each
    stands for. conclude(pass, counts, number of elements of the model, measured so far): what is measured after the
    pass. The elements of tensors that the model leaves alone are zeros that were not counted.
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


class Rule(NamedTuple):
    """A fold rule with its fold-time options resolved.

    slots(spec): the accumulators of a tensor, which start as zeros; not asked for carried tensors. elementwise(spec):
    `fold` may be given any run of elements in place of the whole tensor, flat; the accumulators then have the tensor's
    shape. fold(accumulators, τ, inputs, totals before): may overwrite the accumulators and τ in place; τ is float32 of
    the tensor's shape. settle(totals before, sums, weight): totals after. read(spec, accumulators, totals): what the
    rule calls one, X: the merged task vector at scale 1, float32, in new memory. size(totals): how long X is, and how
    long it may be made. workspace(spec): peak bytes that fold needs beyond the accumulators and τ. gauges(totals):
    figures worth watching, by name (λ of opcm). combine(accumulators, others, totals of both together): adds the
    others' to the accumulators in place, returns ‖X‖². Where a rule has it, folding is
    adding: two states become one, and folding again with minus the weight unfolds.
    measure: what has to be known of a whole model before any of it is folded.
    seeded: `fold` makes random choices, by `inputs.seed`. weighted: a model can be folded with any weight above 0.
    matrix: which tensors the rule takes for matrices, where it tells them apart; its sums then have matrix_sq and
    top_sq (`matrices.figures`).
    shipped: the file beside the weights that `inputs.moments` comes from; a tensor whose τ is zero is folded then like
    any other.
    rounds: no model is folded by itself: rounds over the candidates that wait choose and weigh them
    (`continual.selection`).
    """

    name: str
    summary: str
    options: Mapping[str, Any]
    slots: Callable[[TensorSpec], dict[str, SlotSpec]]
    elementwise: Callable[[TensorSpec], bool]
    fold: Callable[[Accumulators, torch.Tensor, Inputs, Totals], Folded]
    settle: Callable[[Totals, Sums, float], dict[str, float]]
    read: Callable[[TensorSpec, Accumulators, Totals], torch.Tensor]
    size: Callable[[Totals], Size]
    workspace: Callable[[TensorSpec], int]
    gauges: Callable[[Totals], dict[str, float]]
    combine: Callable[[Accumulators, Accumulators, Totals], float] | None = None
    measure: Measure | None = None
    seeded: bool = False
    weighted: bool = False
    shipped: str | None = None
    matrix: Callable[[TensorSpec], bool] | None = None
    rounds: bool = False


class Option(NamedTuple):
    """A fold-time option: `check` returns the value in its canonical form or raises ValueError with what is allowed."""

    default: Any
    help: str
    check: Callable[[Any], Any]


class Row(NamedTuple):
    """A rule in the registry: what it is, its options, how it is read unless told otherwise; `make` gets all options,
    checked.

    bytes_per_parameter: size of its state, for people. order_free: the order of the fine-tunes does not matter beyond
    rounding.
    published: how its paper reads it, where that is not the default. spectral: it tells matrices apart, so `spread` can
    read it.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]
    read: ReadOptions
    bytes_per_parameter: str
    make: Callable[[Mapping[str, Any]], Rule]
    order_free: bool = True
    published: ReadOptions | None = None
    spectral: bool = False


def resolve(what: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options with their values; those not given take their defaults. Raises Misconfigured for unknown ones, or a
    value that is not allowed."""
    for unknown in sorted(set(given) - set(options)):
        raise Misconfigured(
            f"{what}: unknown option {unknown!r}; its options are: {', '.join(sorted(options)) or 'none'}"
        )
    resolved = {}
    for key, option in options.items():
        try:
            resolved[key] = option.check(given.get(key, option.default))
        except ValueError as error:
            raise Misconfigured(f"{what}: {key} = {given[key]!r} has to be {error}") from None
    return resolved
