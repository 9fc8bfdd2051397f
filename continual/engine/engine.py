"""One candidate end to end: look at its headers, ask the gates, stream its tensors through the rule, commit.

The engine never sees HTTP, metrics or the clock of the daemon. It is given what it works with and returns outcomes.
Refusals become records of the ledger here. Retry and Halt pass through with nothing settled.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from continual.engine import standing
from continual.engine.block_orders import BlockOrders
from continual.engine.blocks import most
from continual.engine.fold_orders import FoldOrders
from continual.engine.folding import Terms
from continual.engine.models_inputs import check_inputs
from continual.engine.neighbours import accepted, numbers_of
from continual.engine.outcomes import FoldReport, OpenCandidate, Outcome, known_as
from continual.engine.report import report_of
from continual.engine.resources import Resources
from continual.engine.sent import Sources
from continual.engine.staging import judged
from continual.engine.views import check_weights
from continual.errors import Misconfigured, Refuse
from continual.executors.contract import Progress, silent
from continual.gates import Gates, Headers
from continual.gates.form import FormGate
from continual.gates.lineage import LineageGate, trace
from continual.gates.weight import WeightGate
from continual.records import Candidate, Lineage, Totals
from continual.rules import ReadOptions, Rule, reader
from continual.state import Commit, State, Transaction
from continual.state.entries import FoldEntry, RefuseEntry
from continual.state.format import FoldCommit
from continual.state.generation import Generation
from continual.state.parts import Relevance
from continual.tensors import (
    Adapter,
    BaseModel,
    Checkpoint,
    LayerVectors,
    Model,
    Place,
    candidate_of,
    digest_of,
    open_model,
    open_shipped,
    release_of,
    unreadable,
)
from continual.tensors.bases.kept import is_kept
from continual.tensors.vectors.sketch import SketchPlan
from continual.timing.clock import stage


class TrialFold(NamedTuple):
    """A fold that no record names: what its record would say, and the generation that it wrote."""

    entry: FoldEntry
    generation: Generation


class Engine:
    """Folds candidates into one open state, one at a time. `base` is the base as the state has it, `weights` where its
    weights are read, if anywhere."""

    def __init__(self, state: State, base: BaseModel, rule: Rule, gates: Gates, resources: Resources) -> None:
        """Raises Misconfigured where the settings weigh models and the rule cannot."""
        if not rule.laws.weighted and not gates.the(WeightGate).even:
            raise Misconfigured(
                f"weight: {rule.name} folds every model with weight 1; leave out the settings weight and weights"
            )
        self.state = state
        self.base = self.weights = base
        self.rule = rule
        self.gates = gates
        self.resources = resources
        self.executor = resources.executor
        self.device = resources.device
        self.locate = resources.locate
        self.buffers = threading.local()
        self._foldable = [spec for spec in base.specs if spec.kind != "carried"]

    def reading_from(self, weights: BaseModel) -> Engine:
        """The same engine, which reads the weights of the base from `weights`: that of a state of adapters has none."""
        found = copy.copy(self)
        found.weights = weights
        return found

    def fold(self, place: Place, *, progress: Progress = silent) -> Outcome:
        """Takes the model at `place` from its headers to a commit. A refusal is a record in the ledger and an outcome.
        Raises Retry (nothing is settled) and Halt."""
        return self.consider(place, partial(self._go, progress, None))

    def fold_chosen(self, model: Model, chosen: Relevance, progress: Progress) -> Outcome:
        """As `fold`, of an open model that a round chose; the record keeps what the round says of it (`chosen`)."""
        return self._look(model, candidate_of(model), partial(self._go, progress, chosen))

    def consider(self, place: Place, then: Callable[[Headers], Outcome]) -> Outcome:
        """Opens the model at `place`, asks the gates about its headers, and returns what `then` makes of it.

        A candidate whose fate is settled is not opened again. A refusal, of a gate or of `then`, is a record in the
        ledger and an outcome. Raises Retry and Halt.
        """
        with ExitStack() as open_files:
            try:
                if (key := place.settled_key) and (known := self.settled(key)):
                    return known_as(place.name, known)
                with stage("open"):
                    model = open_model(place)
                    open_files.callback(model.close)
                    candidate = candidate_of(model)
            except Refuse as refusal:
                return self._refuse(unreadable(place), refusal)
            return self._look(model, candidate, then)

    def _look(self, model: Model, candidate: Candidate, then: Callable[[Headers], Outcome]) -> Outcome:
        """As `consider`, of a model that is open."""
        try:
            if known := self.settled(candidate.key):
                return known_as(candidate.name, known)
            with stage("gates"):
                seen = self.vet(candidate, model)
            return then(seen)
        except Refuse as refusal:
            return self._refuse(candidate, refusal)

    def _go(self, progress: Progress, chosen: Relevance | None, seen: Headers) -> Outcome:
        """Folds a candidate whose headers the gates let in."""
        return self._fold(OpenCandidate.of(self.gates.at_fold(seen)), progress, chosen)

    def settled(self, key: str) -> Commit | None:
        """The record that settled the candidate `key`; None where it is to be looked at: it is new, or was refused by
        settings that have other values now."""
        return standing.settled(self.state.ledger, key, self.gates.values)

    def vet(self, candidate: Candidate, model: Model) -> Headers:
        """Asks the gates about the headers of a candidate; what they found out. Raises Refuse and Retry."""
        earlier = self.state.ledger.revisions(candidate.origin)
        if self.state.format.form is not None:
            try:
                check_inputs(self.state, self._reader(), [candidate])
            except Misconfigured as error:  # what one candidate lacks stops nobody
                raise Refuse("inputs", f"{error}; then 'continual retry {candidate.name}'") from None
        return self.gates.at_headers(
            Headers(
                candidate,
                model,
                self.base,
                self.state.id,
                release=release_of(model.place),
                earlier=earlier[-1].seq if earlier else None,
                cloned=self.state.ledger.cloned,
                repo=self.state.format.base.repo,
                open_weights=self.resources.open_weights,
                accepted=accepted(self.state.ledger, candidate.key),
            )
        )

    def lineage(self, model: Model, *, by_token: bool | None = None) -> Lineage:
        """How a model that was let in earlier maps to the base, as it was folded, whatever is said now. `by_token`:
        whether its rows were matched by token, where there is a record of it. Raises Refuse as
        `gates.lineage.trace`."""
        gate = dataclasses.replace(self.gates.the(LineageGate), tied="both")
        if by_token is not None:
            gate = dataclasses.replace(gate, vocab="by-token" if by_token else "common-rows")
        with self.gates.told(gate):
            found = trace(self.base, model, gate, again=True)
        form = self.gates.the(FormGate)
        with self.gates.told(form):  # of a state of adapters: without what stays out of a fold
            seen = form.judge(
                Headers(
                    candidate_of(model),
                    model,
                    self.base,
                    self.state.id,
                    lineage=found,
                    open_weights=lambda: self.weights,  # whoever asks for a lineage opens what is read by it
                )
            )
        return found if seen is None or seen.lineage is None else seen.lineage

    def shipped(self, model: Model, lineage: Lineage) -> Checkpoint | None:
        """The values beside the weights that the rule needs, opened; None if it needs none. Raises Refuse if they are
        not there, or not of the weights' shapes."""
        if self.rule.needs.shipped is None or is_kept(self.base):
            return None
        return open_shipped(self.base, model, lineage, self.rule.needs.shipped)

    def stream(self, transaction: Transaction, opened: OpenCandidate, before: Totals, progress: Progress) -> FoldReport:
        """Puts every tensor of a candidate through the rule, into `transaction`, on the rule's totals `before`.

        The gates are asked of each tensor. The sums of the whole model are not judged, and nothing is committed. Raises
        Refuse, Retry and Halt.
        """
        model, lineage = opened.model, opened.lineage
        if self.state.format.form is not None:
            beside = BlockOrders(self.base, transaction, opened, self.gates, self.resources)
            return beside.run(self.state, before, progress)
        with ExitStack() as files:
            read: list[Model] = [model, self.base.checkpoint]
            shipped = self.shipped(model, lineage)
            if shipped is not None:
                files.callback(shipped.close)
                read.append(shipped)
            watched = () if isinstance(model, Adapter) else lineage.folded
            plan = SketchPlan.of(self._foldable, watched)
            terms = Terms(opened.candidate.name, self.rule, before, opened.weight, plan)
            sources = Sources(self.state.format, self.base, model, lineage, shipped)
            orders = FoldOrders(transaction, sources, terms, self.gates, self.resources)
            folds = orders.run(self._foldable, progress)
            for checkpoint in read:
                checkpoint.check_unchanged()
            digest = digest_of({name: folds[name].digest for name in lineage.folded})
        return report_of(opened, terms, folds, self.state.format.base.squares, digest, self.device)

    def _reader(self) -> Rule:
        """The rule that reads a state of adapters now."""
        now = ReadOptions.from_mapping(self.state.ledger.read_options(self.state.ledger.head.seq))
        return reader(self.rule, self.resources.reads or now.rule, blocks=True)

    def go_on(self, name: str) -> None:
        """Raises Abandoned if continual is stopping. `name` is the candidate or work that the message is about."""
        self.resources.go_on(name)

    def _fold(self, opened: OpenCandidate, progress: Progress, chosen: Relevance | None) -> Outcome:
        candidate = opened.candidate
        begun = time.perf_counter()
        before = self.state.ledger.totals
        if self.state.format.form is not None:
            try:
                check_weights(self._reader(), {candidate.name: opened.weight})
            except Misconfigured as error:  # what one candidate brings stops nobody
                raise Refuse("weight", f"{error}; then 'continual retry {candidate.name}'") from None
        with self.state.begin(writes=self.writes(opened)) as transaction:
            report = self.stream(transaction, opened, before, progress)
            if twin := self.state.ledger.folded_digest(report.digest):
                return self._duplicate(report, twin)
            if self.resources.judge is not None:
                progress("evaluate", 0, 1)
            entry = judged(self.state, self.resources.judge, transaction, self._entry(report, opened, chosen))
            self.go_on(candidate.name)
            streamed = time.perf_counter()
            progress("commit", 0, 1)
            with stage("commit"):
                commit = self.state.commit(transaction, entry)
        seconds = {**report.seconds, "commit": time.perf_counter() - streamed, "total": time.perf_counter() - begun}
        message = f"{candidate.name}: folded as record {commit.seq}"
        timed = dataclasses.replace(report, seconds=seconds, numbers=entry.numbers)
        return Outcome("folded", candidate.name, message, None, commit, timed)

    def fold_on_trial(
        self, model: Model, transaction: Callable[[int], Transaction], progress: Progress
    ) -> TrialFold | None:
        """Folds an open model as `fold` does, into the transaction that is begun for so many bytes, and records
        nothing: what was written is sealed. None where the model would not be folded. Raises Retry and Halt."""
        before = self.state.ledger.totals
        try:
            opened = OpenCandidate.of(self.gates.at_fold(self.vet(candidate_of(model), model)))
            with transaction(self.writes(opened)) as writing:
                report = self.stream(writing, opened, before, progress)
                if self.state.ledger.folded_digest(report.digest):
                    return None
                return TrialFold(self._entry(report, opened, None), writing.seal())
        except Refuse:
            return None

    def _entry(self, report: FoldReport, opened: OpenCandidate, chosen: Relevance | None) -> FoldEntry:
        """The record of a fold, if the gates let in what it measured. Raises Refuse."""
        seen = numbers_of(report, opened, self.state, self.base, self.state.ledger.totals)
        warned = (*report.warnings, *self.gates.at_numbers(seen)) or None
        return FoldEntry(
            candidate=report.candidate,
            digest=report.digest,
            totals=report.totals,
            numbers=dataclasses.replace(report.numbers, relevance=chosen, warnings=warned),
            device=report.device,
        )

    def writes(self, opened: OpenCandidate) -> int:
        """About how many bytes a fold writes: what is kept of the tensors that it touches; of an adapter that is kept
        as it is what its layers get and move."""
        if self.state.format.form is None:
            return self.state.format.bytes_of(opened.lineage.folded)
        assert isinstance(opened.model, Adapter), "the gate on the form lets nothing else in"
        folded = set(opened.lineage.folded)
        vectors = LayerVectors(self.base, opened.model, opened.lineage, opened.weights)
        return most(self.state, vectors, [spec for spec in self.base.specs if spec.name in folded])

    def _refuse(self, candidate: Candidate, refusal: Refuse) -> Outcome:
        if known := self.settled(candidate.key):
            return known_as(candidate.name, known)
        settings = dict(refusal.settings) or None
        entry = RefuseEntry(candidate=candidate, reason=refusal.reason, message=str(refusal), settings=settings)
        return Outcome("refused", candidate.name, str(refusal), refusal.reason, self.state.record(entry))

    def _duplicate(self, report: FoldReport, twin: FoldCommit) -> Outcome:
        name = report.candidate.name
        message = (
            f"{name}: duplicate of record {twin.seq} ({twin.entry.candidate.name}): "
            "the same tensors, already in the state"
        )
        entry = RefuseEntry(
            candidate=report.candidate,
            digest=report.digest,
            fate="duplicate",
            reason="duplicate",
            message=message,
        )
        return Outcome("duplicate", name, message, "duplicate", self.state.record(entry), report)
