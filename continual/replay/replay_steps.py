"""What has to be done again to make the merge of a ledger: its records on the line that leads to what is in force, in
their order. Pure: a ledger in, steps out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from continual.errors import Misconfigured
from continual.outside import few
from continual.records import Candidate
from continual.state import Commit, State
from continual.state.entries import (
    FoldEntry,
    InputsEntry,
    RepairEntry,
    RollbackEntry,
    SelectEntry,
    UnfoldEntry,
)
from continual.state.ledger import Ledger

StepKind = Literal["fold", "unfold", "select", "combine", "read", "tag"]


class ReplayStep(NamedTuple):
    """One record to make again: `commit` is that in the ledger, of a tag the record that it names. `tag`: the name."""

    kind: StepKind
    commit: Commit
    tag: str = ""

    @property
    def changes(self) -> bool:
        """Whether tensors are written."""
        return self.kind in ("fold", "unfold", "select", "combine")


class NeededModel(NamedTuple):
    """A model that has to be read again: the record that brought it, its content digest, and whether its rows were
    matched by token."""

    seq: int
    candidate: Candidate
    digest: str
    weight: float
    by_token: bool


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """The steps, the models that they read, by key, and what is not built again, in words."""

    steps: tuple[ReplayStep, ...]
    models: Mapping[str, NeededModel]
    left_out: tuple[str, ...]

    @property
    def brought(self) -> tuple[Commit, ...]:
        """The records that brought the models of other states."""
        return tuple(step.commit for step in self.steps if step.kind == "combine")


def plan_of(state: State) -> ReplayPlan:
    """What has to be done to build the merge of `state` again. Raises Misconfigured naming the record that cannot be
    made again."""
    ledger = state.ledger
    commits = _line(ledger)
    for commit in commits:
        _must_be_known(commit, state)
    left = [
        f"record {commit.seq} read the inputs of tasks ('continual tune --what inputs' reads them again)"
        for commit in commits
        if isinstance(commit.entry, InputsEntry)
    ]
    on_line = {commit.seq for commit in commits}
    undone = [c for c in ledger.log if c.kind == "fold" and c.seq not in on_line]
    if undone:
        left.append(f"folds that a rollback undid: records {few((str(c.seq) for c in undone), most=10)}")
    steps = [
        ReplayStep(kind, commit)
        for commit in ledger.log
        if (kind := _kind(commit)) == "read" or (kind is not None and commit.seq in on_line)
    ]
    named: dict[str | None, list[str]] = {}
    for tag, seq in sorted(ledger.tags.items()):
        named.setdefault(ledger.get(seq).generation, []).append(tag)
    tagged: list[ReplayStep] = []
    for step in steps:
        tagged.append(step)
        if step.changes:
            tagged += [ReplayStep("tag", step.commit, tag) for tag in named.pop(step.commit.generation, ())]
    left += [
        f"tag {tag}: names a record without a merge, or one that is on no line to what is in force"
        for tags in named.values()
        for tag in tags
    ]
    return ReplayPlan(tuple(tagged), _models(steps), tuple(left))


def _line(ledger: Ledger) -> list[Commit]:
    """The records that lead to the newest one, oldest first: a rollback leads to the record that it names."""
    found: list[Commit] = []
    at = ledger.head.seq
    while at > 0:
        commit = ledger.get(at)
        if commit.kind in ("rollback", "repair"):
            entry = commit.entry
            assert isinstance(entry, RollbackEntry | RepairEntry)
            at = entry.to
            continue
        found.append(commit)
        at -= 1
    return found[::-1]


def _kind(commit: Commit) -> StepKind | None:
    if commit.kind == "fold" or commit.kind == "unfold" or commit.kind == "combine":
        return commit.kind
    if commit.kind == "select":
        return "select" if commit.of_kind(SelectEntry).active is not None else None
    return "read" if commit.kind == "tune" else None


def _must_be_known(commit: Commit, state: State) -> None:
    """Raises Misconfigured for a record whose tensors nothing here can make again."""
    if state.format.form is not None and _kind(commit) == "select":
        raise Misconfigured(
            f"record {commit.seq} is of a round that weighed the adapters: such a state cannot be built again without "
            "its calibration rows"
        )


def _models(steps: list[ReplayStep]) -> dict[str, NeededModel]:
    found: dict[str, NeededModel] = {}
    for step in steps:
        entry = step.commit.entry
        if isinstance(entry, FoldEntry):
            weight = entry.numbers.weight
            found[entry.candidate.key] = NeededModel(
                step.commit.seq,
                entry.candidate,
                entry.digest,
                1.0 if weight is None else weight,
                bool(entry.numbers.tokens),
            )
        elif isinstance(entry, SelectEntry):
            for fold in entry.folds or ():
                found[fold.candidate.key] = NeededModel(
                    step.commit.seq, fold.candidate, fold.digest, 1.0, bool(fold.numbers.tokens)
                )
    return found


def folds_again(state: State, entry: UnfoldEntry) -> bool:
    """Whether an unfold folded the later models again, or went back to before its own; else it took the model out."""
    return state.format.form is None and entry.tau_norm is None and entry.active is None


def start_of(state: State, commit: Commit) -> int | None:
    """The record whose merge an unfold began with, to fold the later models on it again; None where that was nothing,
    and of one that took its model out."""
    ledger, entry = state.ledger, commit.of_kind(UnfoldEntry)
    if not folds_again(state, entry):
        return None
    history = ledger.history(commit.seq - 1)
    gone = next(i for i, f in enumerate(history) if (f.commit.seq, f.commit.key) == (entry.of, entry.key))
    again = [i for i, fold in enumerate(history) if fold.commit.seq in entry.again and i != gone]
    before = min([gone, *again]) - 1
    if before < 0:
        return None
    at = history[before].at
    if at is None:
        raise Misconfigured(f"record {commit.seq} began in the middle of a combined state: it cannot be made again")
    return at.seq
