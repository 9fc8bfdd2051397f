"""What the records of the ledger are made of: the frozen parts of their `numbers` (FORMAT.md). Optional fields are left
out of the file where a record does not have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from continual.records import KEY, OMITTED, REST, Candidate, FileDigest, MatrixTotals, Warned

_OMITTED = {OMITTED: True}
RowFate = Literal["folded", "chosen", "deferred", "refused", "expired"]
"""What a round makes of a member."""


@dataclass(frozen=True, slots=True)
class NoteSummary:
    """Smallest, mean and largest value of a rule's note over the `tensors` that have it."""

    min: float
    mean: float
    max: float
    tensors: int


@dataclass(frozen=True, slots=True)
class Relevance:
    """What the round that chose a model found: see `MemberFate`."""

    score: float | None = None
    change: float | None = None
    error: float | None = None
    z: float | None = None
    weight: float | None = None
    merged: MergedWord | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedRows:
    """How the rows of `tables` were matched by the texts of their tokens: `TokenRows`, as far as a record keeps it.

    `rows`: how many were folded; `runs` where they are few, and `digest` of all of them; `left_out` and `lacking`: the
    first of so many tokens.
    """

    tables: tuple[str, ...]
    rows: int
    runs: tuple[tuple[int, int, int], ...] | None = field(default=None, metadata=_OMITTED)
    digest: str
    left_out: tuple[str, ...] = ()
    left_out_count: int = 0
    lacking: tuple[str, ...] = ()
    lacking_count: int = 0


@dataclass(frozen=True, slots=True)
class SketchText:
    """The sketch of a task vector (tensors/vectors/sketch.py): `norms`, ‖τ‖ in each group of layers; `values`, its
    numbers as text."""

    norms: tuple[float, ...]
    values: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetNumbers:
    """How a task vector lies to the merge before it. By group of layers, as of its sketch: `cosines` with the merge,
    and `removed`, the share of ‖τ‖² that the rule's projection took away (OPCM). Of a few matrices, which are in the
    groups `sampled` (counted from 0): `overlap`, the share of ‖τ‖² along the leading directions of the merge, and
    `conflict`, the share of Σ|τ| where the merge has the other sign (`tensors/vectors/meeting.py`)."""

    cosines: tuple[float, ...] = ()
    removed: tuple[float, ...] | None = field(default=None, metadata=_OMITTED)
    sampled: tuple[int, ...] | None = field(default=None, metadata=_OMITTED)
    overlap: tuple[float, ...] | None = field(default=None, metadata=_OMITTED)
    conflict: tuple[float, ...] | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The metrics of the merge with a model in it (`after`), of the merge before it (`before`; None where nobody could
    be asked), and of the base, where limits go by it. `errors`: the standard error of how much each differs from
    `before`, over rows, which were `rows` at most. `verdict`: pass, fail or inconclusive."""

    after: Mapping[str, float]
    before: Mapping[str, float] | None = field(default=None, metadata=_OMITTED)
    base: Mapping[str, float] | None = field(default=None, metadata=_OMITTED)
    errors: Mapping[str, float] | None = field(default=None, metadata=_OMITTED)
    rows: int | None = field(default=None, metadata=_OMITTED)
    verdict: str | None = field(default=None, metadata=_OMITTED)


def without_sketches(body: Mapping[str, object]) -> dict[str, object]:
    """The JSON body of a record for people and machines: a sketch is thousands of numbers as one word, for the gates
    alone."""

    def shown(value: object) -> object:
        if isinstance(value, dict):
            return {key: shown(item) for key, item in value.items() if key != "sketch"}
        return [shown(item) for item in value] if isinstance(value, list) else value

    return {key: shown(value) for key, value in body.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldNumbers:
    """What a fold measured. Norms are L2 over the whole model.

    `tau_norm`: of the task vector; `base_norm`: of the base's tensors that were folded; `merged_norm`: of the merged
    task vector after the fold; `cosine`: of the task vector and the merged one before it, None where one of them is
    zero; `weight`: what it was folded with, where the rule has weights.
    `matrix_norm`, `plain_norm`, `spread_norm`: what the model added to the totals of
    a rule that sees matrices (`MatrixTotals`). `block`, `cut`: of a state that keeps adapters, the adapter's number in
    it, and the share of ‖τ‖² that was cut off when it came. `tensors`, `unchanged`: how many got a task vector, how
    many the candidate lacks; `extra`: names of the first of its `extra_count` tensors that the base lacks; `prefix`,
    `narrowed`, `rows`, `renamings`: as in `Lineage`, of the last the first; `tokens`: tables whose rows were matched by
    token. `sketch`: what later models are compared with; `stands_out`: how far a direction stands out of noise; both
    are of tensors/vectors/sketch.py. `met`: how it lies to the merge before it.
    `warnings`: of gates that only warn; `evaluated`: what a command said of the merge. `notes`: by the rule's
    names; `gauges`: the rule's gauges after the fold, by name. A fold that came with another state, or that a round
    weighed, has few of these.
    """

    tau_norm: float
    base_norm: float | None = field(default=None, metadata=_OMITTED)
    merged_norm: float | None = field(default=None, metadata=_OMITTED)
    cosine: float | None = field(default=None, metadata=_OMITTED)
    weight: float | None = field(default=None, metadata=_OMITTED)
    matrix_norm: float | None = field(default=None, metadata=_OMITTED)
    plain_norm: float | None = field(default=None, metadata=_OMITTED)
    spread_norm: float | None = field(default=None, metadata=_OMITTED)
    block: int | None = field(default=None, metadata=_OMITTED)
    cut: float | None = field(default=None, metadata=_OMITTED)
    tensors: int | None = field(default=None, metadata=_OMITTED)
    unchanged: int | None = field(default=None, metadata=_OMITTED)
    extra: tuple[str, ...] | None = field(default=None, metadata=_OMITTED)
    extra_count: int | None = field(default=None, metadata=_OMITTED)
    prefix: tuple[str, str] | None = field(default=None, metadata=_OMITTED)
    narrowed: Mapping[str, str] | None = field(default=None, metadata=_OMITTED)
    rows: Mapping[str, int] | None = field(default=None, metadata=_OMITTED)
    renamings: tuple[tuple[str, str], ...] | None = field(default=None, metadata=_OMITTED)
    tokens: tuple[MatchedRows, ...] | None = field(default=None, metadata=_OMITTED)
    sketch: SketchText | None = field(default=None, metadata=_OMITTED)
    stands_out: float | None = field(default=None, metadata=_OMITTED)
    met: MetNumbers | None = field(default=None, metadata=_OMITTED)
    warnings: tuple[Warned, ...] | None = field(default=None, metadata=_OMITTED)
    evaluated: Evaluated | None = field(default=None, metadata=_OMITTED)
    notes: Mapping[str, NoteSummary] | None = field(default=None, metadata=_OMITTED)
    relevance: Relevance | None = field(default=None, metadata=_OMITTED)
    gauges: Mapping[str, float] = field(default_factory=dict, metadata={REST: True})

    @property
    def warned(self) -> str:
        """The reasons of what gates found that only warn; empty where there are none."""
        return ", ".join(one.reason for one in self.warnings or ())

    @property
    def figures(self) -> MatrixTotals | None:
        """What the model added to the totals of a rule that sees matrices; None where its record does not say."""
        if self.matrix_norm is None or self.plain_norm is None or self.spread_norm is None:
            return None
        return MatrixTotals(self.matrix_norm, self.plain_norm, self.spread_norm)


@dataclass(frozen=True, slots=True)
class BroughtFold:
    """A model that came into the merge with others, in one record of another kind than `fold`."""

    candidate: Candidate
    digest: str
    numbers: FoldNumbers


@dataclass(frozen=True, slots=True)
class MemberName:
    """A member of a round."""

    key: str
    name: str


@dataclass(frozen=True, slots=True)
class MergedWord:
    """What the rule's merge says of a member of a round: the loss on `rows` rows in all, with it folded too against
    without. `change`, `error` and `z` are as in `MemberFate`. `task`: the number, from 0, of the task that it serves,
    and `name` that task's; None of a member that was chosen and serves no task."""

    rows: int
    change: float
    error: float
    z: float
    task: int | None = field(default=None, metadata=_OMITTED)
    name: str | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True)
class MemberFate:
    """A member at the end of a round, or a model that the round weighed.

    `score`: ⟨g, τ⟩ at the merge, without the model where it is in it, in units of the loss; `change` and `error`: what
    a trial of the model, or its being in the merge, does to the mean loss of held-out rows, and the standard error of
    that; `z`: their ratio; None where it was not tried, as where the score already is not below zero. `weight`: what
    Frank-Wolfe gave it; `rank`: of those chosen for a rule, which is folded first, from 0. `judged`: 1 if this round
    counts towards patience. `settings`: of one that is refused, as in `RefuseEntry`. `merged`: what the rule's merge
    says of one that serves a task and was left out by then, or that was chosen and serves none.
    """

    key: str
    name: str
    fate: RowFate
    reason: str
    message: str
    judged: int = 0
    score: float | None = None
    change: float | None = None
    error: float | None = None
    z: float | None = None
    weight: float | None = None
    rank: int | None = field(default=None, metadata={KEY: "place"})
    settings: Mapping[str, object] | None = field(default=None, metadata=_OMITTED)
    merged: MergedWord | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """The settings that the choice of a round depends on; ops/docs/settings.md has each. `active` is how many models
    are weighed at most."""

    trial: float
    sigmas: float
    stays: float
    patience: int
    step: str
    rho: float
    search: str
    layers: bool
    tolerance: float
    steps: int
    best: int
    active: int
    inner: int
    age: float
    most: int


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A way of reading that a tuning tried, and its score as the evaluation gave it. `weights`: those of models by
    their keys, where they were tuned or tuned before. `loss`: where coefficients of layers were tried, that of the rows
    that drive; the score is then minus that of the rows that judge. `drift`: how far what is predicted of texts that
    must stay is from what was predicted at the start, in nats a token."""

    scale: str
    lines: tuple[float, float] | None
    score: float
    weights: Mapping[str, float] | None = field(default=None, metadata=_OMITTED)
    loss: float | None = field(default=None, metadata=_OMITTED)
    drift: float | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True)
class CommandEvaluation:
    """An evaluation by a command: its words, the key of its result, and whether a lower one is better."""

    command: tuple[str, ...]
    key: str | None
    lower: bool
    kind: Literal["command"] = "command"


@dataclass(frozen=True, slots=True)
class RowsEvaluation:
    """An evaluation by an objective on the rows of a file."""

    objective: str
    batch: int
    file: FileDigest | None = field(default=None, metadata=_OMITTED)
    heads: FileDigest | None = field(default=None, metadata=_OMITTED)
    kind: Literal["rows"] = "rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInputs:
    """The second moments of the inputs of layers on the rows of one task: below `inputs/` in the directory `id`, whose
    receipts.json has the CRC `receipts`. `models`: words that name the models of this task. `rows`: how many were run;
    `vectors`: how many inputs the layer had that had most; `nbytes`: of the values on disk."""

    id: str
    receipts: str
    models: tuple[str, ...]
    rows: int
    vectors: int
    nbytes: int = field(metadata={KEY: "bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedShare:
    """What a model has in a release, as its `continual.json` says: the weight it is read with, its share of the lengths
    of all task vectors, its cosine with the merge, and how much of that changes without it."""

    name: str
    weight: float
    norm: float
    cosine: float
    change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HookCall:
    """A server that was told: `number` is the hook's in the settings, from 1; `seconds` include all `attempts`."""

    number: int
    kind: str
    target: str
    ok: bool
    attempts: int
    seconds: float
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryVerdict:
    """What became of a canary: who decided it (`by`: `command`, `http`, `time`, `hub` or `metric`), the `why` in a
    sentence, after so many `measurements`, of which the newest had these `values`."""

    verdict: Literal["promoted", "failed"]
    by: str
    why: str
    measurements: int
    values: tuple[float, ...] = ()
