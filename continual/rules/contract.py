"""What a rule is: pure functions over one tensor's accumulators and the model's totals. No rule lives here, and no list
of rules.

A rule never sees a file, a clock, a device of its own choice or global random state. `fold` and `read` work on the
device of the tensors that they are given.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, NamedTuple

from continual.lazily import Tensor
from continual.lazily import numpy as np
from continual.records import SlotSpec, TensorSpec, Totals
from continual.rules.apart import Apart, LeftOut
from continual.rules.layer_inputs import ByInputs
from continual.rules.options import O, Option, declared, plain, resolve
from continual.rules.scale import ReadOptions, Size
from continual.rules.terms import ModelTerms

if TYPE_CHECKING:
    import numpy.typing as npt

    Counts = npt.NDArray[np.int64]
else:
    Counts = "numpy.ndarray"  # for annotations alone

Accumulators = dict[str, Tensor]
"""What a rule keeps of one tensor, by slot name: fixed shapes and dtypes from the first fold on, zeros before it."""
"""What a pass counts."""


class Sums(NamedTuple):
    """What one tensor adds to the figures of the whole model. They are added in float64; the order does not matter.

    `tau_sq` ‖τ‖², `dot` ⟨τ, X before the fold⟩, `merged_sq` ‖X after it‖². Of a tensor that the rule takes for a matrix
    also `matrix_sq`, ‖τ‖² again, and `top_sq`, the square of τ's largest singular value.
    """

    tau_sq: float = 0.0
    dot: float = 0.0
    merged_sq: float = 0.0
    matrix_sq: float | None = None
    top_sq: float | None = None

    @staticmethod
    def total(parts: Sequence[Sums]) -> Sums:
        """The sums of several tensors, or of several runs of one, added exactly. A part without a figure adds 0; a
        figure that no part has stays None."""
        matrix_sq, top_sq = (
            math.fsum(found) if (found := [value for value in column if value is not None]) else None
            for column in ([part.matrix_sq for part in parts], [part.top_sq for part in parts])
        )
        return Sums(
            math.fsum(part.tau_sq for part in parts),
            math.fsum(part.dot for part in parts),
            math.fsum(part.merged_sq for part in parts),
            matrix_sq,
            top_sq,
        )


class Inputs(NamedTuple):
    """What a fold is given besides the task vector.

    `weight`: what the model is folded with; minus that weight unfolds it. `seed`: for random choices, from the tensor's
    content and name. `measured`: what the passes before the fold found, None where the rule needs none. `start`: the
    index of the first element, where a run of a tensor is folded. `moments`: what was shipped beside the weights for
    it, float32 of τ's shape, not negative. `rank`: the sum of the ranks of the task vectors that were folded into this
    tensor before, where all of them are known and this one's is.
    """

    spec: TensorSpec
    weight: float = 1.0
    seed: int = 0
    measured: object = None
    start: int = 0
    moments: Tensor | None = None
    rank: int | None = None


class Pass(ABC):
    """A pass over all task vectors of a model before it is folded; it counts something.

    Elements of tensors that the model does not change are zeros, and are not counted.
    """

    @property
    @abstractmethod
    def share(self) -> float:
        """Of which share of the elements the pass has to see; below 1 a sample spread over every tensor will do."""

    @property
    @abstractmethod
    def usual(self) -> float:
        """How often the elements are seen from here on, where no pass finds that a rare one is needed."""

    @property
    @abstractmethod
    def bins(self) -> int:
        """How many counts the pass makes."""

    @abstractmethod
    def tally(self, tau: Tensor, inputs: Inputs, counts: Counts, times: int) -> None:
        """Adds the counts of τ, a flat run of a tensor on the CPU, to `counts` in place, each multiplied by `times`:
        how many elements one of a sample stands for. May overwrite τ."""

    @abstractmethod
    def conclude(self, counts: Counts, numel: int) -> object:
        """What follows from the counts over a model of `numel` elements: the next pass, or what was to be found, which
        is then `Inputs.measured`."""


class Folded(NamedTuple):
    """One tensor after a fold. `notes` are reported only."""

    accumulators: Accumulators
    sums: Sums
    notes: Mapping[str, float] = MappingProxyType({})


def _always(spec: TensorSpec) -> bool:
    return True


def _unknown(spec: TensorSpec, kept: float, totals: Totals) -> float | None:
    return None


def _no_gauges(totals: Totals) -> dict[str, float]:
    return {}


class FoldFunctions(NamedTuple):
    """How a task vector enters the accumulators of its tensor.

    apply(accumulators, τ, inputs, totals before): may overwrite the accumulators and τ in place; τ is float32 of the
    tensor's shape. workspace(spec): peak bytes that it needs beyond the accumulators and τ. elementwise(spec): `apply`
    may be given any run of elements in place of the whole tensor, flat; the accumulators then have the tensor's shape.
    A stack that is not folded by runs comes expert by expert, each as a matrix of its own (`TensorSpec.expert`).
    """

    apply: Callable[[Accumulators, Tensor, Inputs, Totals], Folded]
    workspace: Callable[[TensorSpec], int]
    elementwise: Callable[[TensorSpec], bool] = _always


class ReadFunctions(NamedTuple):
    """How the merged task vector is read.

    unit(spec, accumulators, totals): what the rule calls one, X: the merged task vector at scale 1, float32 of the
    tensor's shape, in new memory; of a stack it is asked for each expert. size(totals): how long X is, and how long it
    may be made. matrix(spec): whether the rule takes this tensor for a matrix, or for a stack of them, where it tells
    them apart; the sums of these have `matrix_sq` and `top_sq`. gauges(totals): figures worth watching, by name.
    elementwise(spec): `unit` may be given any run of elements in place of the whole tensor, flat, and gives that run of
    X. square(spec, kept, totals): ‖X‖² of a tensor whose fold left `kept` as its `Sums.merged_sq`; None where X has to
    be read to know it. goes_by(spec, totals): what of the totals `unit` goes by, as plain data; None: by all of them.
    terms(accumulators, totals): X of a matrix by the terms of the models, by their numbers from 1 on, in the order in
    which they were folded; None where the rule keeps no model apart.
    """

    unit: Callable[[TensorSpec, Accumulators, Totals], Tensor]
    size: Callable[[Totals], Size]
    matrix: Callable[[TensorSpec], bool] | None = None
    gauges: Callable[[Totals], dict[str, float]] = _no_gauges
    elementwise: Callable[[TensorSpec], bool] = _always
    square: Callable[[TensorSpec, float, Totals], float | None] = _unknown
    goes_by: Callable[[TensorSpec, Totals], object] | None = None
    terms: Callable[[Accumulators, Totals], ModelTerms] | None = None


LARGE = 1 << 22
"""Elements of a tensor that may be whole in memory, with all that is made of it."""


class Needs(NamedTuple):
    """What a rule needs besides the task vectors.

    `measure`: the first pass over a model before any of it is folded. `own`: the first pass over a tensor that `fold`
    needs whole; where what it finds is `inputs.measured`, `fold` goes element by element. It is made where a tensor has
    more than LARGE elements and is no stack. `seeded`: `fold` makes random choices, by
    `inputs.seed`. `shipped`: the file beside the weights that `inputs.moments` comes from; a tensor whose τ is zero is
    folded then like any other. `ranks`: `fold` is faster where it knows `inputs.rank`. `inputs`: to read, of every
    model the inputs that layers have on rows of its task; then it reads adapters alone.
    """

    measure: Pass | None = None
    own: Pass | None = None
    seeded: bool = False
    shipped: str | None = None
    ranks: bool = False
    inputs: bool = False


class Laws(NamedTuple):
    """What holds for a rule.

    `order_free`: the order of the fine-tunes does not matter beyond rounding. `weighted`: a model can be folded with
    any weight above 0. combine(accumulators, others, totals of both together): adds the others' accumulators in place
    and returns ‖X‖² after; where a rule has it, folding is adding: two states become one, and folding again with minus
    the weight unfolds. `lightest`: of the weight of a model that is so subtracted, the least share that each of the
    others has to have, since what rounding leaves hides lighter ones. `rounds`: no model is folded by itself; rounds
    over the candidates that wait choose and weigh them (`continual.selection`). `keeps`: words for what the
    accumulators are, where another rule keeps the same: a rule can read the states of another that keeps all that it
    keeps itself.
    """

    order_free: bool = True
    weighted: bool = False
    combine: Callable[[Accumulators, Accumulators, Totals], float] | None = None
    lightest: float = 0.0
    rounds: bool = False
    keeps: frozenset[str] = frozenset()


class CoreFunctions(NamedTuple):
    """How a rule is put through small matrices, for tensors of which this holds: with every task vector turned alike,
    to Q τ_i Rᵀ, what is read is turned alike. Then X = Q·X′·Rᵀ, X′ being what is read of the cores QᵀτR, and Q and R
    any orthonormal bases of what the task vectors write to and read from.

    slots(rows, columns): the accumulators of a core. fold: as in `FoldFunctions`; the spec is the tensor's own.
    read(accumulators, totals, sides): X′, of any float dtype; `sides` are rows and columns of the tensor itself.
    """

    slots: Callable[[int, int], dict[str, SlotSpec]]
    fold: Callable[[Accumulators, Tensor, Inputs, Totals], Folded]
    read: Callable[[Accumulators, Totals, tuple[int, int]], Tensor]


class Triplets(NamedTuple):
    """Singular triplets of several task vectors, those of one together and largest first: `u` (m×k), `sigma` (k), `v`
    (n×k), float64, each σ times the weight of its model, and the number of each one's task vector in `owner`, from 1
    on. `sides`: rows and columns of the tensor itself, where `u` and `v` are turned into a smaller basis of what they
    span."""

    owner: Sequence[int]
    u: Tensor
    sigma: Tensor
    v: Tensor
    sides: tuple[int, int] | None = None


class Factored(NamedTuple):
    """How a rule is read where every task vector is a product of thin factors (`continual.blocks`), the m×n tensor
    never made.

    linear(spec): X of this tensor is Σ c_i·τ_i, each c_i a number. Of the other tensors: `cores` puts them through
    small matrices; triplets(those of all task vectors, totals): the factors of X, m×k and n×k, straight from theirs.
    without(task vectors): X without each of them, where the rule has a quicker way than reading again. whole(task
    vectors): X in their coordinates, where it has a quicker way than `cores`; None where it has none for these.
    `by_inputs`: X where the inputs of the layer are known; where they are not it is linear. owners(those of all task
    vectors, totals): whose each column of what `triplets` gives is, where X is a sum with a term of each task vector;
    `wide`: at most so many of these columns come of one triplet.
    """

    linear: Callable[[TensorSpec], bool] = _always
    cores: CoreFunctions | None = None
    triplets: Callable[[Triplets, Totals], tuple[Tensor, Tensor]] | None = None
    without: Callable[[Apart], LeftOut] | None = None
    whole: Callable[[Apart], Tensor | None] | None = None
    by_inputs: ByInputs | None = None
    owners: Callable[[Triplets, Totals], Sequence[int]] | None = None
    wide: int = 1


def one_sum(spec: TensorSpec) -> dict[str, SlotSpec]:
    """The slot `sum`: one float32 tensor of the weight's own shape."""
    return {"sum": SlotSpec(spec.shape)}


class Rule(NamedTuple):
    """A rule with its options resolved. `options` are all of them, as plain data.

    slots(spec): the accumulators of a tensor, which start as zeros; not asked for carried tensors. Those of a stack are
    those of its experts, one after the other. `factored`: how it is read from factors; None where it has to see the
    elements, or more than the task vectors.
    """

    fold: FoldFunctions
    read: ReadFunctions
    slots: Callable[[TensorSpec], dict[str, SlotSpec]] = one_sum
    needs: Needs = Needs()
    laws: Laws = Laws()
    factored: Factored | None = None
    name: str = ""
    options: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class RuleRow(Generic[O]):
    """A rule in the list of rules: what it is, its options, how it is read unless told otherwise.

    bytes_per_parameter: size of its state, for people. options: the dataclass that declares them. make: the rule, from
    its options. published: how its paper reads it, where that is not the default. earlier: what the options meant that
    it did not have at first, of states whose record does not name them.
    """

    name: str
    summary: str
    paper: str
    bytes_per_parameter: str
    read: ReadOptions
    published: ReadOptions | None = None
    options: type[O]
    make: Callable[[O], Rule]
    earlier: Mapping[str, object] = field(default_factory=dict)

    @property
    def declared(self) -> dict[str, Option]:
        """Its options by name."""
        return declared(self.options)

    def rule(self, given: Mapping[str, object] = MappingProxyType({})) -> Rule:
        """The rule with these options; those not given take their defaults. Raises Misconfigured for an unknown option,
        or a value that is not allowed."""
        options: O = resolve(f"rule {self.name}", self.options, given)
        return self.make(options)._replace(name=self.name, options=plain(options))

    @property
    def spectral(self) -> bool:
        """Whether it tells matrices apart, so that `spread` can read it."""
        return self.rule().read.matrix is not None
