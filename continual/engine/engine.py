"""One candidate end to end: look at its headers, vet it, stream its tensors through the rule, judge the report, commit.

The engine never sees HTTP, metrics or the clock of the daemon; it is given an executor and returns outcomes. Refusals
become ledger records here; Retry and Halt pass through with nothing settled.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from continual import provenance
from continual.engine.folding import Folding, Piece, need, run_length, state_bytes, total
from continual.engine.outcomes import Outcome, Plan, Policy, known_as
from continual.errors import Abandoned, ContinualError, Misconfigured, Refuse, Retry
from continual.executors.contract import Executor, Progress, silent
from continual.gates import safety, weight
from continual.gates.lineage import trace
from continual.records import Candidate, Entry, FoldReport, Lineage
from continual.rules import Rule
from continual.state import Commit, State, Transaction
from continual.tensors import (
    BaseModel,
    Checkpoint,
    Folder,
    Model,
    Place,
    TaskVectors,
    candidate_of,
    open_model,
    open_shipped,
    release_of,
    unreadable,
)

Locate = Callable[[Mapping[str, Any]], Place]
"""Finds the place of a candidate by what its record says of it."""

_LISTED = 100
"""Names of tensors that stay out that a record lists: a header can claim any number of them."""


class Engine:
    """Folds candidates into one open state, one at a time."""

    def __init__(
        self,
        state: State,
        base: BaseModel,
        rule: Rule,
        executor: Executor,
        *,
        policy: Policy | None = None,
        device: str = "auto",
        locate: Locate | None = None,
    ) -> None:
        """`locate` finds the place of a candidate that a record names; default: the directory that it says."""
        self.state = state
        self.base = base
        self.rule = rule
        self.policy = policy or Policy()
        self.executor = executor
        self.locate: Locate = locate or (lambda identity: Folder(Path(identity["origin"]), source=identity["source"]))
        self.device = pick_device(device)
        self.stop = threading.Event()
        self.buffers = threading.local()
        self._specs = {spec.name: spec for spec in base.specs}
        if not rule.weighted and not self.policy.weights.even:
            raise Misconfigured(
                f"weight: {rule.name} folds every model with weight 1; leave out the settings weight and weights"
            )

    def fold(
        self, place: Place, *, progress: Progress | None = None, chosen: Mapping[str, Any] | None = None
    ) -> Outcome:
        """Takes the model at `place` from its headers to a commit; `chosen` is what the round that chose it puts beside
        its numbers.

        Raises Retry (environment; nothing settled) and Halt; a candidate that is refused is a record in the ledger and
        an outcome.
        """

        def go(candidate: Candidate, model: Model, lineage: Lineage) -> Outcome:
            return self._fold(candidate, model, lineage, progress or silent, chosen or {})

        return self._consider(place, go)

    def admit(self, place: Place) -> Outcome:
        """Takes the model at `place` into the pool, by its headers alone: it waits there, by reference, for a round.
        Raises as `fold` does."""

        def wait(candidate: Candidate, model: Model, lineage: Lineage) -> Outcome:
            if waiting := self.state.ledger.pool.get(candidate.key):
                return Outcome(
                    "known",
                    candidate.name,
                    f"{candidate.name}: waits in the pool since {waiting.since}",
                    "waiting",
                    waiting.commit,
                )
            if self.rule.shipped is not None:
                self._shipped(model, lineage)
            if self.policy.updates == "refuse" and "revision" in candidate.facts:
                self._replace_waiting(candidate)
            message = f"{candidate.name}: waits in the pool for a round"
            entry = Entry(
                kind="defer",
                candidate=candidate.identity(),
                fate="deferred",
                reason="waiting",
                message=message,
                software=provenance.software(),
            )
            return Outcome("deferred", candidate.name, message, "waiting", self.state.record(entry))

        return self._consider(place, wait)

    def _replace_waiting(self, candidate: Candidate) -> None:
        """Settles commits of the same repo that wait: the one that came now is looked at in their place."""
        for waiting in self.state.ledger.pool.values():
            older = waiting.commit.entry.candidate or {}
            if older.get("origin") == candidate.origin and older.get("key") != candidate.key:
                message = f"{older['name']}: a newer commit of it waits in its place"
                software = provenance.software()
                self.state.record(
                    Entry(
                        kind="refuse",
                        candidate=older,
                        fate="refused",
                        reason="superseded",
                        message=message,
                        software=software,
                    )
                )

    def _consider(self, place: Place, then: Callable[[Candidate, Model, Lineage], Outcome]) -> Outcome:
        """The headers of a candidate vetted, and what comes `then` if it may come in."""
        with ExitStack() as open_files:
            candidate = None
            try:
                if (key := place.settled_key) and (known := self.state.ledger.fate(key)):
                    return known_as(place.name, known)
                model = open_model(place)
                open_files.callback(model.close)
                candidate = candidate_of(model)
                if known := self.state.ledger.fate(candidate.key):
                    return known_as(candidate.name, known)
                lineage = self._vet(candidate, model)
                return then(candidate, model, lineage)
            except Refuse as refusal:
                return self._refuse(candidate or unreadable(place), refusal)

    def plan(self, place: Place) -> Plan:
        """Says what folding the model at `place` would take, reading nothing but headers; never raises for a bad
        candidate."""
        try:
            with open_model(place) as model:
                candidate = candidate_of(model)
                if known := self.state.ledger.fate(candidate.key):
                    return Plan(
                        candidate.name,
                        str(place),
                        candidate.form,
                        False,
                        "known",
                        known_as(candidate.name, known).message,
                    )
                lineage = self._vet(candidate, model)
                weight.weight_of(self.policy.weights, candidate.name, model)
                shipped = self._shipped(model, lineage)
                if shipped:
                    shipped.close()
                vectors = TaskVectors(self.base, model, lineage, shipped=shipped)
                passes = 1.0 + self.rule.seeded + (self.rule.measure.usual if self.rule.measure else 0.0)
                kinds = [self._specs[name].kind for name in lineage.folded]
                return Plan(
                    name=candidate.name,
                    path=str(place),
                    form=candidate.form,
                    ok=True,
                    reason=None,
                    message="fits this base",
                    passes=passes,
                    read_bytes=int(
                        passes * (candidate.nbytes + sum(self._specs[name].nbytes for name in lineage.folded))
                    )
                    + (shipped.nbytes if shipped else 0),
                    disk_bytes=state_bytes(self.rule, self.base.specs),
                    memory_bytes=self._peak([need(self.rule, self._specs[name], vectors) for name in lineage.folded]),
                    folded=len(lineage.folded),
                    matrices=kinds.count("matrix"),
                    plain=kinds.count("plain"),
                    unchanged=len(lineage.unchanged),
                    prefix=lineage.prefix,
                    extra=lineage.extra,
                    narrowed=lineage.narrowed,
                )
        except (Refuse, Retry) as error:
            return Plan(
                place.name, str(place), "?", False, error.reason if isinstance(error, Refuse) else "retry", str(error)
            )

    def _vet(self, candidate: Candidate, model: Model) -> Lineage:
        provenance.refuse_own_release(candidate.name, release_of(model.place), self.state.id)
        if self.policy.updates == "refuse" and (earlier := self.state.ledger.revisions(candidate.origin)):
            raise Refuse(
                "update",
                f"{candidate.name}: other files at {candidate.origin} were folded as record {earlier[-1].seq}; "
                "set updates = add to fold these as well, or publish them under a new name",
            )
        return trace(self.base, model, self.policy.lineage)

    def _fold(
        self, candidate: Candidate, model: Model, lineage: Lineage, progress: Progress, chosen: Mapping[str, Any]
    ) -> Outcome:
        begun = time.perf_counter()
        before = dict(self.state.ledger.totals)
        factor = weight.weight_of(self.policy.weights, candidate.name, model)
        with self.state.begin() as transaction:
            report = self.stream(transaction, candidate, model, lineage, before, factor, progress)
            if twin := self.state.ledger.folded_digest(report.digest):
                return self._duplicate(candidate, report, twin)
            safety.norms(
                candidate.name,
                report.numbers["tau_norm"] ** 2,
                report.numbers["base_norm"] ** 2,
                before,
                self.policy.norms,
            )
            self.go_on(candidate.name)
            streamed = time.perf_counter()
            progress("commit", 0, 1)
            entry = Entry(
                kind="fold",
                candidate=candidate.identity(),
                digest=report.digest,
                fate="folded",
                totals=report.totals,
                numbers={**report.numbers, **chosen},
                software=provenance.software(),
                device=report.device,
            )
            commit = transaction.commit(entry)
        seconds = {**report.seconds, "commit": time.perf_counter() - streamed, "total": time.perf_counter() - begun}
        message = f"{candidate.name}: folded as record {commit.seq}"
        return Outcome("folded", candidate.name, message, None, commit, provenance.timed(report, seconds))

    def stream(
        self,
        transaction: Transaction,
        candidate: Candidate,
        model: Model,
        lineage: Lineage,
        before: Mapping[str, float],
        factor: float,
        progress: Progress,
    ) -> FoldReport:
        """Puts every tensor of a candidate through the rule with the weight `factor`, into `transaction`; nothing is
        judged or committed here."""
        with ExitStack() as files:
            shipped = self._shipped(model, lineage)
            if shipped:
                files.callback(shipped.close)
            vectors = TaskVectors(self.base, model, lineage, run=run_length(self.device), shipped=shipped)
            go_on = partial(self.go_on, candidate.name)
            folding = Folding(
                transaction, vectors, self.rule, before, candidate.name, self.device, go_on, weight=factor
            )
            self._measure(folding, lineage, progress)
            vectors.begin()
            pieces = self._stream(folding, lineage, progress)
            for read in (model, self.base.checkpoint, *((shipped,) if shipped else ())):
                read.check_unchanged()
            digest = vectors.digest({name: pieces[name].digest for name in lineage.folded})
            return self._report(candidate, lineage, pieces, before, digest, factor)

    def _shipped(self, model: Model, lineage: Lineage) -> Checkpoint | None:
        """The values beside the weights that the rule needs, if it needs any. Raises Refuse if they are not there, or
        not of the weights' shapes."""
        if self.rule.shipped is None:
            return None
        return open_shipped(self.base, model, lineage, self.rule.shipped)

    def _measure(self, folding: Folding, lineage: Lineage, progress: Progress) -> None:
        """What the rule has to know of the whole model before it folds any of it; counts are whole numbers, so their
        order does not matter."""
        measure = self.rule.measure
        if measure is None:
            return
        numel = sum(spec.numel for spec in self.base.specs if spec.kind != "carried")
        for number in range(measure.passes):
            share = measure.share(number, folding.measured)
            if share == 0.0:
                continue
            folding.vectors.begin()
            names = sorted(lineage.folded, key=folding.vectors.position)
            tasks = [folding.measuring(self._specs[name], number, share) for name in names]
            counts = torch.zeros((), dtype=torch.int64)
            for done, (_, found) in enumerate(self.executor.map(tasks), 1):
                counts = counts + found
                progress(f"measure {number + 1}", done, len(tasks))
            folding.measured = measure.conclude(number, counts, numel, folding.measured)

    def _stream(self, folding: Folding, lineage: Lineage, progress: Progress) -> dict[str, Piece]:
        """Every foldable tensor of the base through the rule, in parallel; the pieces by name."""
        folded = set(lineage.folded)
        specs = sorted(
            (s for s in self.base.specs if s.kind != "carried"), key=lambda s: folding.vectors.position(s.name)
        )
        tasks = [folding.task(spec, touched=spec.name in folded) for spec in specs]
        pieces: dict[str, Piece] = {}
        progress("fold", 0, len(tasks))
        for name, piece in self.executor.map(tasks):
            pieces[name] = piece
            progress("fold", len(pieces), len(tasks))
        return pieces

    def go_on(self, name: str) -> None:
        """Raises Abandoned if continual is stopping."""
        if self.stop.is_set():
            raise Abandoned(
                f"{name}: the fold was given up because continual is stopping; it will be taken up at the next start"
            )

    def _report(
        self,
        candidate: Candidate,
        lineage: Lineage,
        pieces: Mapping[str, Piece],
        before: Mapping[str, float],
        digest: str,
        factor: float,
    ) -> FoldReport:
        ordered = [pieces[name] for name in sorted(pieces)]
        sums = total([piece.sums for piece in ordered])
        squares = self.state.format.base["squares"]
        base_sq = math.fsum(squares[name] for name in lineage.folded)
        totals = self.rule.settle(before, sums, factor)
        tau, cross = math.sqrt(sums["tau_sq"]), math.sqrt(sums["tau_sq"] * before.get("merged_sq", 0.0))
        numbers: dict[str, Any] = {
            "tau_norm": tau,
            "base_norm": math.sqrt(base_sq),
            "merged_norm": math.sqrt(sums["merged_sq"]),
            "cosine": sums["dot"] / cross if cross else 0.0,
            **self.rule.gauges(totals),
            **({"weight": factor} if self.rule.weighted else {}),
            "tensors": len(lineage.folded),
            "unchanged": len(lineage.unchanged),
            "extra": list(lineage.extra[:_LISTED]),
            "extra_count": len(lineage.extra),
            "prefix": list(lineage.prefix),
            "narrowed": dict(lineage.narrowed),
            "rows": dict(lineage.rows),
            "notes": summarise([piece.notes for piece in ordered if piece.notes]),
        }
        stages: dict[str, float] = {}
        for piece in ordered:
            for stage, value in piece.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + value
        return FoldReport(
            candidate=candidate,
            digest=digest,
            lineage=lineage,
            totals=totals,
            numbers=numbers,
            seconds=stages,
            bytes_read=sum(piece.nbytes for piece in ordered),
            device=str(self.device),
        )

    def _refuse(self, candidate: Candidate, refusal: Refuse) -> Outcome:
        if known := self.state.ledger.fate(candidate.key):
            return known_as(candidate.name, known)
        entry = Entry(
            kind="refuse",
            candidate=candidate.identity(),
            fate="refused",
            reason=refusal.reason,
            message=str(refusal),
            software=provenance.software(),
        )
        return Outcome("refused", candidate.name, str(refusal), refusal.reason, self.state.record(entry))

    def _duplicate(self, candidate: Candidate, report: FoldReport, twin: Commit) -> Outcome:
        message = f"{candidate.name}: duplicate of record {twin.seq} ({(twin.entry.candidate or {}).get('name')}): the same tensors, already in the state"
        entry = Entry(
            kind="refuse",
            candidate=candidate.identity(),
            digest=report.digest,
            fate="duplicate",
            reason="duplicate",
            message=message,
            software=provenance.software(),
        )
        return Outcome("duplicate", candidate.name, message, "duplicate", self.state.record(entry), report)

    def _peak(self, needs: list[int]) -> int:
        most = sorted(needs, reverse=True)[: self.executor.workers]
        return max([min(sum(most), self.executor.budget), *most[:1]], default=0)


def pick_device(word: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. TF32 is off: it would round to 10 bits.

    Raises ContinualError if CUDA is asked for and not there.
    """
    if word != "cpu":
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            return torch.device("cuda" if word == "auto" else word)
        if word != "auto":
            raise ContinualError(f"device = {word}: this torch sees no CUDA device; use auto or cpu")
    return torch.device("cpu")


def summarise(notes: list[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Smallest, mean and largest of each note over the tensors that have it."""
    columns: dict[str, list[float]] = {}
    for row in notes:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {
        key: {"min": min(v), "mean": math.fsum(v) / len(v), "max": max(v), "tensors": len(v)}
        for key, v in sorted(columns.items())
    }
