"""What a gate is: a rule about who may come into the merge. No gate lives here, and no list of them.

A gate is a frozen dataclass. Its fields are its settings, its method `judge` is its verdict. `judge` raises Refuse to
keep a candidate out, and returns nothing to let it pass. It is pure: the same gate says the same of the same record,
and changes nothing. It may read headers and small files of the model, so Retry can pass through it.

The class that a gate is made from says at which stage it is asked:

- `AtHeaders`: of every candidate that comes, from names, shapes and small files; no weight is read.
- `AtFold`: of a candidate that is folded now, before its weights are read. Not of one that only joins the pool.
- `AtTensor`: while the tensors stream by, from the sums of one tensor. It is called on several threads.
- `AtNumbers`: after all tensors streamed by and before the commit, from the sums of the whole model.

What asks the merged model itself before the commit is no gate here: `continual.evaluation`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from continual.records import Candidate, Lineage, Totals, Warned
from continual.tensors import BaseModel, Model
from continual.tensors.vectors.products import HeadFigures
from continual.tensors.vectors.sketch import Sketch


class Headers(NamedTuple):
    """A candidate before any of its weights is read.

    `state`: the id of the state; `cloned`: those of the states that it was cloned from. `release`: the `continual.json`
    beside the model, if it is an export of ours. `earlier`: the newest fold in force of other files from the same
    origin. `lineage` (None until the gate of that name has passed), `weight` and `weights` are what gates have found
    out. `repo`: that of the base on the Hub, where it came from there. `open_weights`: opens the base with its weights,
    in a state that keeps none; it raises Halt where they are not there. `weights`: the base so opened, where the
    candidate takes them. `accepted`: a person wants it in spite of doubts. `warnings`: of gates that only warn.
    """

    candidate: Candidate
    model: Model
    base: BaseModel
    state: str
    release: Mapping[str, object] | None = None
    earlier: int | None = None
    lineage: Lineage | None = None
    weight: float = 1.0
    cloned: Sequence[str] = ()
    repo: str | None = None
    open_weights: Callable[[], BaseModel] | None = None
    weights: BaseModel | None = None
    accepted: bool = False
    warnings: tuple[Warned, ...] = ()


class TensorNumbers(NamedTuple):
    """One tensor of the model `name` after its fold.

    `tau_sq` is ‖τ‖² of the tensor; of the part that was folded last, where the rule folds a tensor part by part.
    """

    name: str
    tensor: str
    tau_sq: float


class Earlier(NamedTuple):
    """A model that is in the merge: its name, ‖τ‖ over the whole model, the sketch of τ, where its record has one, and
    whether it came from the place that the candidate came from."""

    name: str
    tau_norm: float
    sketch: Sketch | None = None
    same_place: bool = False


def nobody() -> Sequence[Earlier]:
    """Of a merge of which nothing is known."""
    return ()


def nothing_paired() -> Sequence[HeadFigures]:
    """Of a model of which no pair of matrices was read."""
    return ()


class Numbers(NamedTuple):
    """The model `name` after all its tensors streamed by.

    `tau_norm`: ‖τ‖ over the whole model. `base_norm`: ‖θ₀‖ over the tensors that were folded, None in a state that does
    not read its base. `totals`: those of the state before this fold; `count` and `norm_sum` give the mean norm of what
    was folded so far. `cut`: the share of ‖τ‖² that a state of adapters has no room for, in tensors that were changed
    by more than a product of two thin factors. `sketch`: of τ. `stands_out`: how far its largest direction stands out
    of noise (`Picture.stands_out`), the median of some matrices. `layer_norms`: ‖θ₀‖ of each group of layers of the
    sketch, where the base is read. `earlier` gives those that are in the merge, the oldest first. `accepted`: a person
    wants it in spite of doubts. `cosine`: with the merge before it, `layer_cosines` in each group of layers,
    where these are known. `paired` reads the pairs of matrices that moved far, and compares their products (Retry).
    `grids`: of some matrices, on which grid of a quantisation their numbers lie and the base's do not, empty for none.
    """

    name: str
    tau_norm: float
    base_norm: float | None
    totals: Totals
    cut: float = 0.0
    sketch: Sketch | None = None
    stands_out: float | None = None
    layer_norms: Sequence[float] = ()
    earlier: Callable[[], Sequence[Earlier]] = nobody
    accepted: bool = False
    cosine: float | None = None
    layer_cosines: Sequence[float] = ()
    paired: Callable[[], Sequence[HeadFigures]] = nothing_paired
    grids: Sequence[str] = ()


@dataclass(frozen=True)
class Gate:
    """What all gates have. `name`: one word for people and settings. `reasons`: every reason with which it refuses.

    `shared`: the fields that have the value of the setting (`config.Settings`) of that name. Every other field is a
    setting of this gate alone, whatever it is called: `[gates.NAME]` in the settings file, `--gate NAME.KEY=VALUE` on
    the command line.
    """

    name: ClassVar[str]
    reasons: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Doubt(Gate):
    """A gate that goes by likelihood: what it keeps out by a setting (`by`) may be meant so. `act`: `refuse`, `warn`
    (the record of the fold says what it found) or `off`. Of a candidate that a person accepted it only warns."""

    act: Literal["refuse", "warn", "off"] = "refuse"


class AtHeaders(Gate, ABC):
    """A gate that is asked of every candidate, from its headers."""

    @abstractmethod
    def judge(self, seen: Headers) -> Headers | None:
        """Raises Refuse to keep the candidate out. Returns `seen` with what the gate found out, or None."""


class AtFold(Gate, ABC):
    """A gate that is asked of a candidate that is folded now, before its weights are read."""

    @abstractmethod
    def judge(self, seen: Headers) -> Headers | None:
        """Raises Refuse to keep the candidate out. Returns `seen` with what the gate found out, or None."""


class AtTensor(Gate, ABC):
    """A gate that is asked of every tensor. Thread-safe."""

    @abstractmethod
    def judge(self, seen: TensorNumbers) -> None:
        """Raises Refuse to keep the candidate out."""


class AtNumbers(Gate, ABC):
    """A gate that is asked of the sums of the whole model, before the commit."""

    @abstractmethod
    def judge(self, seen: Numbers) -> None:
        """Raises Refuse to keep the candidate out."""
