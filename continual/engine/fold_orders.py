"""The tensors of one candidate as orders: what a process needs to fold some of them, and how all that came back becomes
one fold. What folding a tensor is, folding.py says.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from continual.engine import passes
from continual.engine.folding import Counted, Folding, TensorFold, Terms
from continual.engine.needs import need
from continual.engine.parts_of_repo import PartsOfRepo, PieceReads, WithRead, parts_read
from continual.engine.resources import AwayPlace, Resources
from continual.engine.sent import SentSources, Sources
from continual.errors import Retry
from continual.executors.contract import Progress, Task
from continual.executors.device import pick_device
from continual.executors.orders import WorkJob, WorkPiece, at_hand
from continual.gates import Gates
from continual.hub.marks import FilesRead
from continual.records import TensorSpec, Totals
from continual.rules import Counts, Pass, rule_of
from continual.state import Transaction
from continual.state.attempts import Attempt, Handed
from continual.tensors import Checkpoint, TaskVectors
from continual.tensors.vectors.sketch import SketchPlan
from continual.tensors.vectors.vectors import RUN

R = TypeVar("R", bound=WithRead)


class SentTerms(NamedTuple):
    """`Terms` as plain data, without the rule, which is the state's; and the gates and the device of the fold."""

    name: str
    totals: Totals
    weight: float
    plan: SketchPlan
    gates: Gates
    device: str


class Tallied(NamedTuple):
    """What a pass counted in a tensor, and what another process read of a candidate on the Hub until then."""

    counts: Counts
    read: FilesRead | None = None


@dataclass(frozen=True)
class PassJob(WorkJob[Tallied]):
    """A pass over tensors: which each of them has. `added`: only the sum of all counts is asked for, so an order adds
    its own, and the first of its pieces has them."""

    sources: SentSources
    terms: SentTerms
    counted: Counted
    passes: Mapping[str, Pass]
    added: bool

    def open(self) -> AwayPasses:
        return AwayPasses(self)


@dataclass(frozen=True)
class FoldJob(WorkJob[TensorFold]):
    """The fold of a candidate; `handed` is None where it can be done in this process alone."""

    sources: SentSources
    terms: SentTerms
    counted: Counted
    handed: Handed | None

    def open(self) -> AwayFolding:
        return AwayFolding(self)


class PassBench:
    """Counts in tensors of one candidate."""

    def __init__(self, folding: Folding, work: Mapping[str, Pass]) -> None:
        self._folding, self._passes = folding, work

    def work(self, names: Sequence[str]) -> list[Tallied]:
        """What the passes count. Raises Refuse, Retry, Abandoned."""
        return [Tallied(self._folding.counts(name, self._passes[name])) for name in names]

    def close(self) -> None:
        """Nothing: who opened the files closes them."""


class _Opened:
    """A candidate that this process opened for an order."""

    def __init__(self, sources: SentSources, terms: SentTerms, counted: Counted) -> None:
        form, workplace = sources.form, AwayPlace(pick_device(terms.device))
        made = Terms(terms.name, rule_of(form.rule, form.options), terms.totals, terms.weight, terms.plan)
        self.sources = sources.open()
        self.vectors = _vectors(self.sources, terms.plan)
        self.folding = Folding(self.vectors, made, terms.gates, workplace)
        self.folding.counted = counted

    def parts_read(self) -> FilesRead | None:
        """As `parts_of_repo.parts_read`."""
        return parts_read(self.sources.model.place)


class AwayPasses:
    """Counts in tensors for another process."""

    def __init__(self, job: PassJob) -> None:
        self._opened, self._added = _Opened(job.sources, job.terms, job.counted), job.added
        self._bench = PassBench(self._opened.folding, job.passes)

    def work(self, names: Sequence[str]) -> list[Tallied]:
        """As `PassBench.work`."""
        self._opened.vectors.begin(names)
        counts = [one.counts for one in self._bench.work(names)] if not self._added else self._summed(names)
        found = [Tallied(one) for one in counts]
        found[-1] = found[-1]._replace(read=self._opened.parts_read())
        return found

    def _summed(self, names: Sequence[str]) -> list[Counts]:
        counts = self._bench.work(names[:1])[0].counts
        for name in names[1:]:
            counts += self._bench.work([name])[0].counts
        return [counts, *(np.zeros(1, np.int64) for _ in names[1:])]

    def close(self) -> None:
        """Closes the files."""
        self._opened.sources.close()


class AwayFolding:
    """Folds tensors for another process, whose transaction takes what was written."""

    def __init__(self, job: FoldJob) -> None:
        assert job.handed is not None, "a fold that no other process may write into"
        self._handed, self._before = job.handed, job.handed.generation()
        self._opened = _Opened(job.sources, job.terms, job.counted)

    def work(self, names: Sequence[str]) -> list[TensorFold]:
        """Folds tensors into an attempt of its own, which is on disk when it returns. Raises Refuse, Retry, Halt."""
        attempt, found = Attempt(self._handed, self._before), []
        vectors, folding = self._opened.vectors, self._opened.folding.into(attempt)
        vectors.begin(names)
        for number, name in enumerate(names):
            for following in names[number + 1 : number + 2]:
                if vectors.has(following):
                    vectors.prefetch(following)
            found.append(folding.fold(name)._replace(written=attempt.taken()))
        found[-1] = found[-1]._replace(read=self._opened.parts_read())
        attempt.sync()
        return found

    def close(self) -> None:
        """Closes the files."""
        self._opened.sources.close()


class FoldOrders:
    """One candidate, put through the rule in one transaction, by orders. `specs` are those of the base that are
    folded."""

    def __init__(
        self, transaction: Transaction, sources: Sources, terms: Terms, gates: Gates, resources: Resources
    ) -> None:
        self.vectors = _vectors(sources, terms.plan)
        self._transaction = transaction
        self._rule = terms.rule
        self._sources = sources
        self._terms = terms
        self._gates = gates
        self._executor = resources.executor
        self._resources = resources
        self._folding = Folding(self.vectors, terms, gates, resources).into(transaction)

    def run(self, specs: Sequence[TensorSpec], progress: Progress) -> dict[str, TensorFold]:
        """Makes the passes that the rule asks for, then puts every tensor of `specs` through it, several at a time;
        what each gave, by name. Raises Refuse, Retry, Abandoned.

        Tensors that the candidate leaves as they are come first: there is nothing to read where ‖X‖² of them is known.
        """
        ordered = sorted(specs, key=lambda spec: self.vectors.position(spec.name))
        self._parts = self._shared(ordered)
        if self._executor.elsewhere:
            self._parts.begin(self._executor.workers)
        self._measure(ordered, progress)
        self.vectors.begin()
        found: dict[str, TensorFold] = {}
        handed = self._transaction.hand_out() if self._executor.elsewhere else None
        job = FoldJob(secrets.token_hex(8), *self._sent(self._parts.whole), handed)
        tasks: list[Task[TensorFold]] = []
        progress("fold", 0, len(specs))
        for spec in ordered:
            if self.vectors.has(spec.name):
                tasks.append(self._task(job, spec, need(self._rule, spec, self.vectors)))
            elif (square := self._transaction.square(spec.name)) is not None:
                found[spec.name] = self._folding.left(spec, square)
            else:
                tasks.append(Task(spec.name, need(self._rule, spec, None), WorkPiece(job, spec.name)))
        with at_hand(job, self._folding):
            for name, tensor in self._parts.map(self._executor, tasks):
                if tensor.written is not None:
                    self._transaction.take_over(tensor.written)
                found[name] = tensor
                progress("fold", len(found), len(specs))
        if lacking := {spec.name for spec in specs} - found.keys():
            raise Retry(f"{self._terms.name}: {min(lacking)} was not folded; nothing was settled")
        self._transaction.measured(
            {name: tensor.sums.merged_sq for name, tensor in found.items()},
            {name: tensor.rank for name, tensor in found.items() if tensor.rank},
        )
        return found

    def _measure(self, ordered: Sequence[TensorSpec], progress: Progress) -> None:
        """Makes the passes before the fold."""
        changed = [spec for spec in ordered if self.vectors.has(spec.name)]
        numel, names = sum(spec.numel for spec in ordered), [spec.name for spec in changed]
        folding, first = self._folding, self._rule.needs.measure
        folding.counted = Counted(first)
        folding.counted = Counted(passes.of_model(first, names, numel, partial(self._tally, added=True), progress))
        own = passes.of_tensors(self._rule, changed, self._tally, progress)
        folding.counted = Counted(folding.counted.model, own)

    def _tally(self, work: Mapping[str, Pass], *, added: bool = False) -> Iterator[tuple[str, Counts]]:
        """Makes a pass over tensors; `added` is as a `PassJob` has it."""
        self.vectors.begin()
        job = PassJob(secrets.token_hex(8), *self._sent(), work, added)
        tasks = [
            self._task(job, self.vectors.spec(name), passes.pass_need(self.vectors, name), each.share, once=False)
            for name, each in work.items()
        ]
        with at_hand(job, PassBench(self._folding, work)):
            yield from ((name, one.counts) for name, one in self._parts.map(self._executor, tasks, once=False))

    def _task(self, job: WorkJob[R], spec: TensorSpec, takes: int, share: float = 1.0, *, once: bool = True) -> Task[R]:
        """The work of one tensor that the candidate has."""
        prefetch = partial(self.vectors.prefetch, spec.name) if share == 1.0 else None
        piece = self._parts.piece(job, spec.name, once=once)
        return Task(spec.name, takes, piece, prefetch, int(2 * share * spec.nbytes))

    def _shared(self, specs: Sequence[TensorSpec]) -> PartsOfRepo:
        """The candidate as several processes read it."""
        sources, vectors = self._sources, self.vectors
        files = [*sources.model.files, *(sources.shipped.files if sources.shipped is not None else ())]
        mine = [spec for spec in specs if self._executor.elsewhere and vectors.has(spec.name)]
        pieces = {spec.name: PieceReads(vectors.extents(spec.name), 2 * spec.nbytes) for spec in mine}
        weights = [file.name for file in files if file.name.endswith(".safetensors")]
        return PartsOfRepo(sources.model.place, weights, pieces, full=isinstance(sources.model, Checkpoint))

    def _sent(self, whole: frozenset[str] = frozenset()) -> tuple[SentSources, SentTerms, Counted]:
        terms = self._terms
        return (
            self._sources.sent(self._rule.needs.shipped, whole),
            SentTerms(
                terms.name, terms.totals, terms.weight, terms.plan, self._gates, self._resources.device_elsewhere
            ),
            self._folding.counted,
        )


def _vectors(sources: Sources, plan: SketchPlan) -> TaskVectors:
    found = TaskVectors(sources.base, sources.model, sources.lineage, run=RUN, shipped=sources.shipped)
    found.looked = plan.sampled
    return found
