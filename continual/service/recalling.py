"""What the pages tell of the past of an open merge, made out of its records: a fold, a model, the picture of layers,
the evaluations, the generations, the settings in force. It reads no tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from continual.api import Merge
from continual.config import Settings
from continual.config.given import Looked
from continual.engine.attributing import layer_groups
from continual.engine.fullness import Fullness
from continual.records import Totals
from continual.service import in_force, showing
from continual.service.past import Past
from continual.service.web.recalled import (
    AboutFold,
    AboutModel,
    FoldList,
    GroupChange,
    KeptGeneration,
    LayerColumn,
    LayerPicture,
    ModelRecord,
    PlacedShare,
    RecalledEvaluation,
    RecalledFold,
    RecalledWarning,
    RefusalList,
    RowsWanted,
    SettingInForce,
)
from continual.service.web.view import ShownShares
from continual.state import Commit, retention
from continual.state.entries import RefuseEntry, RetryEntry
from continual.state.format import FoldCommit
from continual.state.going_back import reachable
from continual.state.parts import FoldNumbers
from continual.tensors.vectors.sketch import SketchPlan

RECORDS = 100
"""Records about one model that are shown."""
EVALUATED = 200
"""Folds, the newest, among which evaluations are shown."""
_KEPT = "kept"
"""The note of a rule that says which share of ‖τ‖² its projection kept."""


class Recalling:
    """Tells of the past of `merge`. Safe from several threads."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.past = Past(merge.state)
        self._groups: tuple[str, ...] | None = None
        self._sizes: dict[str, int] = {}

    def folds(self, wanted: RowsWanted) -> FoldList:
        """The folds that are asked for."""
        found = self.past.wanted_folds(wanted)
        full = showing.fullness_of(self.merge)
        rows = tuple(self._fold(fold, full) for fold in found.commits if isinstance(fold, FoldCommit))
        return FoldList(rows, found.total, found.before)

    def refusals(self, wanted: RowsWanted) -> RefusalList:
        """The refusals that are asked for."""
        found = self.past.wanted_refusals(wanted)
        rows = (replace(showing.refusal(commit), now=self._now(commit)) for commit in found.commits)
        return RefusalList(tuple(rows), found.total, found.before)

    def fold(self, seq: int, part: int = 0) -> AboutFold | None:
        """All that is told of a fold; None where record `seq` brought no such one."""
        commit = self.past.fold(seq, part)
        if commit is None:
            return None
        ledger = self.merge.state.ledger
        shown = self._fold(commit, showing.fullness_of(self.merge))
        numbers, candidate = commit.entry.numbers, commit.entry.candidate
        totals = ledger.totals if shown.in_force else Totals()
        older, newer = self.past.beside(commit)
        record = ledger.get(seq)
        weight = 1.0 if numbers.weight is None else numbers.weight
        return AboutFold(
            fold=shown,
            kind=record.kind,
            key=candidate.key,
            origin=candidate.origin,
            digest=commit.entry.digest,
            nbytes=candidate.nbytes,
            licence=candidate.licence,
            tags=tuple(sorted(tag for tag, at in ledger.tags.items() if at == seq)),
            back=record.generation in reachable(self.merge.state),
            older=older,
            newer=newer,
            base_norm=numbers.base_norm,
            mean_norm=totals.norm_sum / totals.count if totals.count and totals.norm_sum else None,
            length_share=numbers.tau_norm / totals.norm_sum if totals.norm_sum else None,
            weight_share=weight / totals.weight if totals.weight else None,
            tensors=numbers.tensors,
            unchanged=numbers.unchanged,
            gauges=dict(numbers.gauges),
            notes={name: note.mean for name, note in (numbers.notes or {}).items()},
            groups=self._changes(numbers),
            overlap=_mean(numbers.met.overlap if numbers.met else None),
            conflict=_mean(numbers.met.conflict if numbers.met else None),
            out=_placed(showing.shares(self.merge), candidate.name) if shown.in_force else (),
            warnings=tuple(RecalledWarning(one.gate, one.reason, one.message) for one in numbers.warnings or ()),
            evaluated=_evaluation(commit),
        )

    def model(self, identity: str) -> AboutModel | None:
        """All that is told of a model; None where none has this id."""
        commits = self.past.of_model(identity)
        candidate = commits[-1].entry.candidate if commits else None
        if candidate is None:
            return None
        ledger = self.merge.state.ledger
        waiting, settled = ledger.pool.get(candidate.key), ledger.fate(candidate.key)
        fate, reason, message = "open", None, "it is looked at again when it is seen next"
        if waiting is not None:
            fate, reason, message = "deferred", "waiting", showing.waiting(waiting).said
        elif settled is not None:
            fate, reason = settled.entry.fate or "", settled.entry.reason
            message = settled.entry.message or ""
        fold = self.past.last_fold_of(identity)
        last = settled.entry if settled is not None else None
        return AboutModel(
            id=identity,
            key=candidate.key,
            name=candidate.name,
            origin=candidate.origin,
            form=candidate.form,
            nbytes=candidate.nbytes,
            licence=candidate.licence,
            fate=fate,
            reason=reason,
            message=message,
            settled=None if settled is None else settled.seq,
            settings=dict(last.settings or {}) if isinstance(last, RefuseEntry) else {},
            records=tuple(_record(one) for one in list(commits[-RECORDS:])[::-1]),
            count=len(commits),
            fold=None if fold is None else self._fold(fold, showing.fullness_of(self.merge)),
            waits="" if waiting is None else showing.waiting(waiting).said,
        )

    def picture(self, most: int) -> LayerPicture:
        """What each of the newest `most` folds that are in the merge changed, by groups of layers."""
        standing = self.past.in_force()
        newest: list[FoldCommit] = []
        for fold in reversed(self.past.folds):
            if len(newest) == most:
                break
            if (fold.seq, fold.key or "") in standing:
                newest.append(fold)
        groups = self.groups
        columns = []
        for fold in reversed(newest):
            norms = _norms(fold.entry.numbers, len(groups))
            if norms is not None:
                columns.append(LayerColumn(fold.seq, fold.entry.candidate.name, norms))
        return LayerPicture(groups, tuple(columns))

    def evaluations(self) -> tuple[RecalledEvaluation, ...]:
        """What was measured of the merge at the newest folds, the oldest first."""
        found = (_evaluation(fold) for fold in list(self.past.folds[-EVALUATED:]))
        return tuple(one for one in found if one is not None)

    def generations(self) -> tuple[KeptGeneration, ...]:
        """What is on the disk, the newest first."""
        state = self.merge.state
        ledger, names = state.ledger, state.generations()
        self._sizes = {name: size for name, size in self._sizes.items() if name in names}
        held: dict[str, list[Commit]] = {name: [] for name in names}
        for commit in ledger.log:
            if commit.generation in held:
                held[commit.generation].append(commit)
        tags: dict[str | None, list[str]] = {}
        for tag, seq in sorted(ledger.tags.items()):
            tags.setdefault(ledger.get(seq).generation, []).append(tag)
        found = [
            KeptGeneration(
                name=name,
                first=commits[0].seq,
                last=commits[-1].seq,
                time=commits[0].time,
                nbytes=self._size(name),
                tags=tuple(tags.get(name, ())),
                in_force=name == ledger.head.generation,
            )
            for name, commits in held.items()
            if commits
        ]
        return tuple(sorted(found, key=lambda one: -one.last))

    def settings(self) -> tuple[SettingInForce, ...]:
        """Every setting in force; secrets are masked."""
        return tuple(_settings(self.merge.settings))

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of layers that a sketch tells apart, from the first down to the last."""
        if self._groups is None:
            specs = [spec for spec in self.merge.state.format.tensors if spec.kind != "carried"]
            plan = SketchPlan.of(specs)
            named = layer_groups(specs, plan)
            self._groups = tuple(named[group][1] if group in named else "" for group in range(plan.groups))
        return self._groups

    def _fold(self, commit: FoldCommit, full: Fullness | None) -> RecalledFold:
        numbers = commit.entry.numbers
        shown = showing.fold(commit, full)
        cut = shown.cut_now if shown.cut_now is not None else shown.cut
        kept = None if cut is None else 1.0 - cut
        if kept is None and numbers.notes and _KEPT in numbers.notes:
            kept = numbers.notes[_KEPT].mean
        fate = self.past.fate(commit)
        return RecalledFold(
            shown,
            fate,
            fate == "in the merge",
            self.past.part(commit),
            kept=kept,
            merged_norm=numbers.merged_norm,
            conflict=_mean(numbers.met.conflict if numbers.met else None),
        )

    def _now(self, refusal: Commit) -> str:
        """What has become of a model that was refused, in words."""
        settled = self.merge.state.ledger.fate(refusal.key or "")
        if settled is None:
            return "looked at again"
        fate = settled.entry.fate
        return "in the merge" if fate == "folded" else "kept out" if settled.kind == "refuse" else str(fate)

    def _changes(self, numbers: FoldNumbers) -> tuple[GroupChange, ...]:
        norms = _norms(numbers, len(self.groups))
        if norms is None:
            return ()
        whole = math.fsum(norm * norm for norm in norms) or 1.0
        cosines: Sequence[float | None] = numbers.met.cosines if numbers.met is not None else ()
        if len(cosines) != len(norms):
            cosines = [None] * len(norms)
        return tuple(
            GroupChange(name, norm, norm * norm / whole, cosine)
            for name, norm, cosine in zip(self.groups, norms, cosines, strict=True)
        )

    def _size(self, name: str) -> int:
        """Bytes of the files of a generation, which do not change once it is committed."""
        if name not in self._sizes:
            self._sizes[name] = retention.taken(self.merge.state.path, name, set())
        return self._sizes[name]


def _norms(numbers: FoldNumbers, groups: int) -> tuple[float, ...] | None:
    """‖τ‖ in each group of layers; None where the record does not say it."""
    sketch = numbers.sketch
    return sketch.norms if sketch is not None and len(sketch.norms) == groups else None


def _mean(values: Sequence[float] | None) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _record(commit: Commit) -> ModelRecord:
    entry = commit.entry
    message = entry.message
    if isinstance(entry, RetryEntry) and entry.because:
        message = f"because {entry.because}" + (f", said {entry.by}" if entry.by else "")
    return ModelRecord(commit.seq, commit.time, commit.kind, entry.fate, entry.reason, message)


def _placed(shares: Sequence[ShownShares], name: str) -> tuple[PlacedShare, ...]:
    """What a model has in each place; none where several there are called so."""
    found = []
    for one in shares:
        mine = [share for share in one.models if share.model == name]
        if len(mine) == 1:
            found.append(PlacedShare(one.place, one.seq, mine[0]))
    return tuple(found)


def _evaluation(fold: FoldCommit) -> RecalledEvaluation | None:
    found = fold.entry.numbers.evaluated
    if found is None:
        return None
    return RecalledEvaluation(
        fold.seq,
        fold.time,
        fold.entry.candidate.name,
        found.verdict,
        dict(found.after),
        before=dict(found.before or {}),
        of_base=dict(found.base or {}),
        errors=dict(found.errors or {}),
        rows=found.rows,
    )


def _settings(settings: Settings) -> Iterator[SettingInForce]:
    defaults = {str(row["setting"]): row["value"] for row in in_force.shown(Looked(Settings(), {}))}
    for row in in_force.shown(Looked(settings, {})):
        name, value = str(row["setting"]), row["value"]
        yield SettingInForce(name, _value(value), value != defaults.get(name))


def _value(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return str(value)
