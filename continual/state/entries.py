"""The records of the ledger, one frozen class a kind, and their JSON bodies. Their parts are in parts.py, a record's
link in the chain is in format.py. FORMAT.md specifies all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from continual.errors import Damaged
from continual.records import OMITTED, Candidate, ObjectiveRecord, Totals
from continual.state.fields import body_of, record_of
from continual.state.parts import (
    BroughtFold,
    CanaryVerdict,
    CommandEvaluation,
    FoldNumbers,
    HookCall,
    MemberFate,
    MemberName,
    ReleasedShare,
    RoundTerms,
    RowsEvaluation,
    TaskInputs,
    TrialRecord,
)

EntryKind = Literal[
    "init",
    "fold",
    "refuse",
    "defer",
    "round",
    "select",
    "rollback",
    "unfold",
    "combine",
    "tune",
    "inputs",
    "tag",
    "publish",
    "retry",
    "repair",
    "clone",
]
Fate = Literal["folded", "refused", "duplicate", "deferred", "expired", "rolled-back", "unfolded", "retry"]
_OMITTED = {OMITTED: True}
_COMMON = (
    "candidate",
    "digest",
    "fate",
    "reason",
    "message",
    "totals",
    "read",
    "software",
    "device",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What every record can have besides its place in the chain; a class for each kind adds what only that kind has,
    which is the `numbers` of the file."""

    kind: ClassVar[EntryKind]
    candidate: Candidate | None = None
    digest: str | None = None
    fate: Fate | None = None
    reason: str | None = None
    message: str | None = None
    totals: Totals | None = None
    read: Mapping[str, object] | None = None
    software: Mapping[str, str] | None = None
    device: str | None = None

    def body(self) -> dict[str, object]:
        """As a commit file holds it: every key is there, null where the record has no such thing."""
        found = body_of(self)
        own = {key: found.pop(key) for key in list(found) if key not in _COMMON}
        return {"kind": self.kind, **found, "numbers": own.get("numbers", own) or None}

    def own(self) -> dict[str, object]:
        """What only its kind has, as a commit file holds it under `numbers`."""
        found = self.body()["numbers"]
        return dict(found) if isinstance(found, Mapping) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class InitEntry(Entry):
    """The state was made; `format` is the CRC of its format.json. A state of an earlier version does not say it."""

    kind = "init"
    format: str | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldEntry(Entry):
    """A model was folded."""

    kind = "fold"
    candidate: Candidate
    digest: str
    fate: Fate | None = "folded"
    numbers: FoldNumbers


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseEntry(Entry):
    """A candidate is kept out: refused, a duplicate, or expired. `settings`: the values of those that the refusal went
    by; under other values it may be let in."""

    kind = "refuse"
    candidate: Candidate
    fate: Fate | None = "refused"
    settings: Mapping[str, object] | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeferEntry(Entry):
    """A candidate came into the pool."""

    kind = "defer"
    candidate: Candidate
    fate: Fate | None = "deferred"
    reason: str | None = "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEntry(Entry):
    """A round over the pool began: how it chooses, and who its members are, in the order in which they came."""

    kind = "round"
    mode: Literal["relevance", "frank-wolfe"]
    asked: RoundTerms
    objective: ObjectiveRecord
    members: tuple[MemberName, ...]

    def asks_as(self, other: RoundEntry) -> bool:
        """Whether both choose in one way: of the same members they make the same choice."""
        return (self.mode, self.asked, self.objective) == (other.mode, other.asked, other.objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectEntry(Entry):
    """The round of record `of` ended.

    `objective` is that round's digest; `loss` and `before` are of the driving rows at the end and at the beginning;
    `gap` and `pool_gap` the duality gap over those that have weight or were not turned away, and over all members.
    Where a generation was written: `active`, key to weights (one, or one a layer); `rest`, the weights of what is in
    the merge and not weighed any more; `folds`, the models that entered; `out`, keys of those that left.
    """

    kind = "select"
    of: int
    objective: str
    loss: float
    before: float
    gap: float
    pool_gap: float
    steps: int
    scores: tuple[MemberFate, ...]
    active: Mapping[str, tuple[float, ...]] | None = field(default=None, metadata=_OMITTED)
    rest: tuple[float, ...] | None = field(default=None, metadata=_OMITTED)
    folds: tuple[BroughtFold, ...] | None = field(default=None, metadata=_OMITTED)
    out: tuple[str, ...] | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackEntry(Entry):
    """The merge of record `to` is in force again; so many folds were undone."""

    kind = "rollback"
    to: int
    undone: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfoldEntry(Entry):
    """The fold of the candidate `key` in record `of` was taken out, and those of the records `again` were folded again
    for it. `tau_norm` and `merged_norm` where it was subtracted; `active` and `rest` (see SelectEntry) where the rule
    weighs."""

    kind = "unfold"
    candidate: Candidate
    fate: Fate | None = "unfolded"
    of: int
    key: str
    again: tuple[int, ...] = ()
    tau_norm: float | None = field(default=None, metadata=_OMITTED)
    merged_norm: float | None = field(default=None, metadata=_OMITTED)
    active: Mapping[str, tuple[float, ...]] | None = field(default=None, metadata=_OMITTED)
    rest: tuple[float, ...] | None = field(default=None, metadata=_OMITTED)

    def body(self) -> dict[str, object]:
        """As a commit file holds it; the totals are empty where no model is left and none was subtracted."""
        begun_anew = self.tau_norm is None and self.totals == Totals()
        return Entry.body(self) | ({"totals": {}} if begun_anew else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineEntry(Entry):
    """The folds of another state came in: `of` is its id, `seq` its record."""

    kind = "combine"
    of: str
    seq: int
    folds: tuple[BroughtFold, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneEntry(Entry):
    """Ways of reading were evaluated, and the best is in force: `before` is the first trial, what was in force until
    then; `seconds` the wall time; `folds` how many were in force. Coefficients of layers are found by an objective on
    rows that drive and rows that judge. `drift`: how far what is predicted of texts that must stay may go, in nats a
    token; a trial that went farther was not chosen."""

    kind = "tune"
    trials: tuple[TrialRecord, ...]
    before: TrialRecord
    evaluation: CommandEvaluation | ObjectiveRecord | RowsEvaluation
    seconds: float
    folds: int
    drift: float | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleEntry(Entry):
    """A person set how the merge is read; `of` is the tuning that this went back to, if it did."""

    kind = "tune"
    of: int | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputsEntry(Entry):
    """The inputs that layers of the base have on rows of each task were read: of so many `layers`, each with the
    `rank` largest eigenvalues of its second moment. `across`: those whose inputs meet the rows of the weight; `seconds`
    the wall time."""

    kind = "inputs"
    objective: ObjectiveRecord
    rank: int
    layers: int
    across: tuple[str, ...] = ()
    tasks: tuple[TaskInputs, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TagEntry(Entry):
    """Record `of` was named."""

    kind = "tag"
    tag: str
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEntry(Entry):
    """A settled candidate is to be looked at again. `because`: why it is to be folded in spite of doubts, as the person
    `by` said."""

    kind = "retry"
    candidate: Candidate
    fate: Fate | None = "retry"
    because: str | None = field(default=None, metadata=_OMITTED)
    by: str | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseEntry(Entry):
    """Record `of` is out on the Hub, as `commit` on `branch` of `repo`; `files` were uploaded. `view`: which view of
    the settings was released, where it was not the merge; `mark`: a digest of what was read and of its form. `shares`:
    what the models that matter most have in it, the largest change first, of `models` of which that is known."""

    kind = "publish"
    of: int
    repo: str
    branch: str
    commit: str
    tag: str | None
    uploaded_bytes: int
    files: int
    view: str | None = field(default=None, metadata=_OMITTED)
    mark: str | None = field(default=None, metadata=_OMITTED)
    shares: tuple[ReleasedShare, ...] | None = field(default=None, metadata=_OMITTED)
    models: int | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class HookEntry(Entry):
    """A server was told of record `of`, or could not be; `view`, `mark`: as in `ReleaseEntry`."""

    kind = "publish"
    of: int
    hook: HookCall
    view: str | None = field(default=None, metadata=_OMITTED)
    mark: str | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryEntry(Entry):
    """Record `of`, which was out as a canary, was promoted, or taken back; `view`, `mark`: as in `ReleaseEntry`."""

    kind = "publish"
    of: int
    canary: CanaryVerdict
    view: str | None = field(default=None, metadata=_OMITTED)
    mark: str | None = field(default=None, metadata=_OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairEntry(Entry):
    """The state was damaged, and a person followed what was left. The merge of record `to` is in force again, and so
    many folds were `undone` for it. `lost`: a line for each record that stood after this place; `tags` and
    `generations` that are gone; `inputs` of tasks that are, by their directories; `aside`: the directory in the state
    that has the old files."""

    kind = "repair"
    to: int
    undone: int
    lost: tuple[str, ...]
    tags: tuple[str, ...]
    generations: tuple[str, ...]
    inputs: tuple[str, ...] | None = field(default=None, metadata=_OMITTED)
    aside: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneEntry(Entry):
    """This is a copy of the state that had the id `of`, and goes on as a state of its own, under `id`."""

    kind = "clone"
    id: str
    of: str


ENTRIES: tuple[type[Entry], ...] = (
    InitEntry,
    FoldEntry,
    RefuseEntry,
    DeferEntry,
    RoundEntry,
    SelectEntry,
    RollbackEntry,
    UnfoldEntry,
    CombineEntry,
    TuneEntry,
    ScaleEntry,
    InputsEntry,
    TagEntry,
    RetryEntry,
    ReleaseEntry,
    HookEntry,
    CanaryEntry,
    RepairEntry,
    CloneEntry,
)


_CLASSES: dict[str, type[Entry]] = {entry.kind: entry for entry in ENTRIES}
_OUTSIDE = frozenset(_COMMON)


def entry_of(body: Mapping[str, object], where: object) -> Entry:
    """The entry that the body of a commit file holds. Raises Damaged naming `where` and the key that is missing or has
    another type."""
    for key in ("kind", *_COMMON, "numbers"):
        if key not in body:
            raise Damaged(f"{where}: {key!r} is missing")
    numbers = body["numbers"] if body["numbers"] is not None else {}
    if not isinstance(numbers, Mapping):
        raise Damaged(f"{where}: numbers is {numbers!r:.60}, no object")
    kind = _class(body["kind"], numbers, where)
    own = {"numbers": numbers} if kind is FoldEntry else {k: v for k, v in numbers.items() if k not in _OUTSIDE}
    return record_of(kind, {key: body[key] for key in _COMMON} | own, where, _path_of)


def _path_of(key: str) -> str:
    """The path of a field of an entry in a commit file."""
    return key if key in (*_COMMON, "numbers") else f"numbers.{key}"


def _class(kind: object, numbers: Mapping[str, object], where: object) -> type[Entry]:
    """The class of a record; of two kinds the numbers say which of several classes it is."""
    if kind == "tune":
        return TuneEntry if "trials" in numbers else ScaleEntry
    if kind == "publish":
        return CanaryEntry if "canary" in numbers else HookEntry if "hook" in numbers else ReleaseEntry
    found = _CLASSES.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise Damaged(f"{where}: kind is {kind!r:.60}, none of {', '.join(get_args(EntryKind))}")
    return found
