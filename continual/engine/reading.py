"""The merged model of a state at one record: the rule's result X, tensor by tensor, times the scale.

No file format is known here. `publish` writes what is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from continual import linalg
from continual.engine.reading_orders import squares_of
from continual.engine.spool import KeptTensors, kept_below, roomy
from continual.engine.views import ReadView
from continual.executors.contract import Executor, Progress
from continual.executors.device import pick_device, turn
from continual.lazily import Tensor, torch
from continual.records import TensorSpec, Totals
from continual.rules import Accumulators, ModelTerms, ReadOptions, Rule, ScaleFactors, Size, check_terms, reader
from continual.rules.matrices import sides
from continual.rules.scale import layer_key
from continual.rules.sums import everything
from continual.state import Commit, State

Seen = Callable[[TensorSpec, Tensor], None]
"""Is given a tensor at scale 1, on the thread that read it."""
Parts = tuple[float, float]
"""A figure of the matrices, and the same figure of all other tensors."""


class Reading:
    """The merged model of `state` at record `seq` (default: the newest), read with `options` (default: those in force
    at that record). Thread-safe once it is settled.

    The scale can ask for a length that the rule's totals do not know. Then one pass over all tensors measures ‖X‖; it
    takes as long as reading them. `lengths` keeps what was measured, by generation and rule, for the readings that come
    later. `rule` is the one that the state was made with; `self.rule` the one that reads. `device`: where matrices are
    computed, as the setting of that name says it; all that is read is given on the CPU.
    """

    device = "cpu"

    kept_by_elements = True
    """Whether the state has of each tensor something of its own shape, where the rule says so."""
    stored = True
    """Whether all of it is in the state."""

    def __init__(
        self,
        state: State,
        rule: Rule,
        seq: int | None = None,
        options: ReadOptions | None = None,
        lengths: dict[str, Parts] | None = None,
    ) -> None:
        self.state = state
        self.made, self.asked = rule, options
        self.commit: Commit = state.ledger.head if seq is None else state.ledger.get(seq)
        self.totals = _totals_of(state, self.commit.seq)
        self.options = options or ReadOptions.from_mapping(state.ledger.read_options(self.commit.seq))
        self.rule = reader(rule, self.options.rule, blocks=state.format.form is not None)
        if self.options.terms and state.format.form is None:
            check_terms(self.rule)
        self.lengths = {} if lengths is None else lengths
        self.view = ReadView()
        self.settled_factors: ScaleFactors | None = None
        self.spool: KeptTensors | None = None

    @contextmanager
    def spooled(self, directory: Path, beside: int, *, shared: bool) -> Iterator[None]:
        """While it lasts, what `settle` has to make of the matrices to know how long they are is kept in a file without
        a name in `directory`, or in a directory there if other processes make it (`shared`), and not made again; where
        its disk has room for that and `beside` bytes more. Raises OSError."""
        specs = [spec for spec in self.state.format.tensors if spec.kind != "carried" and not self.elementwise(spec)]
        measures = self.settled_factors is None and self.kept_by_elements and self.options.needs(self.size())
        nbytes = 4 * sum(spec.numel for spec in specs)
        if not (measures and self.commit.generation is not None and nbytes and roomy(directory, nbytes + beside)):
            yield
            return
        with kept_below(directory, {spec.name: spec.numel for spec in specs}, shared=shared) as self.spool:
            try:
                yield
            finally:
                self.spool = None

    def settle(self, executor: Executor, progress: Progress) -> float:
        """Finds out the factor s that X is multiplied by, with a pass over all tensors where that is needed.

        Returns s; where the matrices and the other tensors have two factors, that of the matrices. Raises Retry and
        Halt.
        """
        if self.settled_factors is None:
            if self.options.needs(self.size()) and self.commit.generation is not None:
                self.measure(executor, progress)
            self.settled_factors = self.options.factors(self.totals, self.size())
        return self.settled_factors[0]

    def factor(self) -> float | None:
        """The factor s as `settle` returns it; None if a pass over the tensors would be needed to know it."""
        if self.settled_factors is not None:
            return self.settled_factors[0]
        return None if self.options.needs(self.size()) else self.options.factors(self.totals, self.size())[0]

    def size(self) -> Size:
        """How long X is, as far as that is known without a pass."""
        size = self.rule.read.size(self.totals)
        if self.commit.generation is None:
            return Size(0.0, size.most, (0.0, 0.0))
        parts = self.lengths.get(self._measured)
        if parts is None:
            return size
        return Size(math.hypot(*parts) if size.length is None else size.length, size.most, parts)

    @property
    def contents(self) -> str:
        """A digest of what is read: where it is the same for two records, the same is read at both."""
        return digest_of(self.commit.generation, self.rule, self.options)

    def unit(self, spec: TensorSpec) -> torch.Tensor:
        """X of one tensor, at scale 1, each model's term times its coefficient: float32 of the tensor's shape, in new
        memory. Raises Retry and Damaged."""
        if self.spool is not None and (kept := self.spool.get(spec.name, spec.shape)) is not None:
            return kept
        if self.times_at(spec.name) and self.has_terms(spec):
            return self._by_terms(spec)[0]
        units = (_unit(self, one, kept) for one, kept in self._accumulators(spec))
        if spec.kind != "stack":
            return next(units)
        found = torch.zeros(spec.experts, *spec.expert.shape)
        for number, unit in enumerate(units):
            found[number] = unit
        return found.view(spec.shape)

    def terms(self, spec: TensorSpec) -> Iterator[ModelTerms]:
        """X of a matrix, or of each of a stack, at scale 1 by the terms of the models, by the numbers that `keys` has,
        without coefficients. Only where the rule reads such a sum (`terms_of`). Raises Retry and Damaged."""
        assert self.rule.read.terms is not None, self.rule.name
        for _, accumulators in self._accumulators(spec):
            yield self.rule.read.terms(accumulators, self.totals)

    def has_terms(self, spec: TensorSpec) -> bool:
        """Whether `terms` gives this tensor; else X of it is one sum, of which no model is known."""
        return self.rule.read.terms is not None and self._is_matrix(spec)

    @cached_property
    def keys(self) -> dict[int, str]:
        """The keys of the models that are read, by the numbers of their terms."""
        return {n: fold.entry.candidate.key for n, fold in enumerate(self.state.ledger.folds(at=self.commit.seq), 1)}

    def times_at(self, name: str) -> dict[int, float]:
        """What the terms of models in a layer are multiplied by, by their numbers; nothing where all are 1."""
        key = layer_key(name)
        return {number: mine[key] for number, mine in self._times.items() if mine.get(key, 1.0) != 1.0}

    @cached_property
    def _times(self) -> dict[int, dict[str, float]]:
        return {number: mine for number, key in self.keys.items() if (mine := self.options.terms.of(key))}

    def _by_terms(self, spec: TensorSpec) -> tuple[torch.Tensor, float]:
        """X of a tensor at scale 1, and ‖X‖² without coefficients, by which its length goes."""
        times, squares = self.times_at(spec.name), []
        found = torch.empty(max(1, spec.experts), *sides(spec.expert if spec.kind == "stack" else spec))
        for number, terms in enumerate(self.terms(spec)):
            squares.append(terms.square)
            left, right, _ = terms.times(times)
            found[number] = left @ right.mT
        return found.view(spec.shape), math.fsum(squares)

    def _accumulators(self, spec: TensorSpec) -> Iterator[tuple[TensorSpec, Accumulators]]:
        """The accumulators of a tensor; of a stack those of its experts, each as a matrix of its own."""
        if spec.kind != "stack":
            at = self.commit.seq
            slots = self.rule.slots(spec)  # a state can keep more
            yield spec, {slot: torch.from_numpy(self.state.read(spec.name, slot, at=at)) for slot in slots}
            return
        one, generation = spec.expert, self.state.generation_of(self.commit)
        shapes = {slot: each.shape for slot, each in self.rule.slots(one).items()}
        for values in generation.parts(spec.name, spec.experts) if generation else ():
            yield one, {slot: torch.from_numpy(values[slot]).view(shape) for slot, shape in shapes.items()}

    def vector(self, spec: TensorSpec) -> torch.Tensor:
        """The merged task vector of one tensor: float32 of the tensor's shape, in new memory. `settle` comes first.
        Raises Retry and Damaged."""
        return self.unit(spec).mul_(self.factor_of(spec))

    def factor_of(self, spec: TensorSpec) -> float:
        """What X of this tensor is multiplied by. `settle` comes first."""
        assert self.settled_factors is not None, "settle first"
        return self.settled_factors.of(spec, matrix=self._is_matrix(spec)) * self.options.layer(spec)

    def elementwise(self, spec: TensorSpec) -> bool:
        """Whether `runs` gives this tensor."""
        return self.kept_by_elements and self.rule.read.elementwise(spec)

    def runs(self, spec: TensorSpec, length: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """What `vector` gives, in flat runs of at most `length` elements: (first element, one past the last, values).
        Only of a tensor that is read `elementwise`; `settle` comes first. Raises Retry and Damaged."""
        generation, factor = self.state.generation_of(self.commit), self.factor_of(spec)
        if generation is None:
            for start in range(0, spec.numel, length):
                stop = min(start + length, spec.numel)
                yield start, stop, torch.zeros(stop - start)
            return
        slots = self.rule.slots(spec)  # a state can keep more
        for start, stop, values in generation.runs(spec.name, length):
            accumulators = {slot: torch.from_numpy(values[slot]) for slot in slots}
            yield start, stop, self.rule.read.unit(spec, accumulators, self.totals).mul_(factor)

    def made_from(self, spec: TensorSpec) -> object:
        """All that `vector` of a tensor follows from, as plain data: where it is the same, so is the vector, bit for
        bit. `settle` comes first. Raises Misconfigured and Damaged."""
        generation, factor = self.state.generation_of(self.commit), self.factor_of(spec)
        if generation is None or generation.is_nothing(spec.name):
            return math.copysign(1.0, factor)  # of zeros only the sign can be seen
        by = (self.rule.read.goes_by or everything)(spec, self.totals)
        marks = generation.marks(spec.name, self.rule.slots(spec))
        times = sorted(self.times_at(spec.name).items()) if self.has_terms(spec) else []
        return [self.state.id, self.rule.name, dict(self.rule.options), factor.hex(), by, marks, times]

    def need(self, spec: TensorSpec) -> int:
        """Bytes that reading one tensor takes at its peak. Of a matrix it is as much as a decomposition takes; of a
        stack, all of it and one expert besides."""
        part = spec.expert if spec.kind == "stack" else spec
        if self.elementwise(spec):
            return sum(slot.nbytes for slot in self.rule.slots(spec).values()) + 4 * spec.numel
        works = (self.rule.fold.workspace(part), linalg.workspace(*sides(part))) if self._is_matrix(spec) else (0,)
        kept = sum(slot.nbytes for slot in self.rule.slots(part).values())
        return kept + 4 * (spec.numel + part.numel) + max(works) + (terms_need(self, spec) if self.options.terms else 0)

    def measure(self, executor: Executor, progress: Progress, seen: Seen | None = None) -> float:
        """‖X‖ over the whole model, measured by a pass over the tensors of which the state does not say it; `seen` is
        given all of them. Raises Retry and Damaged."""
        specs = [spec for spec in self.state.format.tensors if spec.kind != "carried"]
        known = {} if seen is not None else self._known(specs)
        left = [spec for spec in specs if spec.name not in known]
        squares: tuple[list[float], list[float]] = ([], [])
        progress("measure", 0, len(left))
        kinds = {spec.name: 0 if self._is_matrix(spec) else 1 for spec in specs}
        for name, square in known.items():
            squares[kinds[name]].append(square)
        for done, (name, square) in enumerate(squares_of(self, left, executor, seen), 1):
            squares[kinds[name]].append(square)
            progress("measure", done, len(left))
        parts = (math.sqrt(math.fsum(squares[0])), math.sqrt(math.fsum(squares[1])))
        if self.commit.generation is not None:
            self.lengths[self._measured] = parts
        return math.hypot(*parts)

    @property
    def _measured(self) -> str:
        """Under which name `lengths` has what is read here."""
        return f"{self.commit.generation} {self.rule.name} {dict(self.rule.options)}"

    def _is_matrix(self, spec: TensorSpec) -> bool:
        return self.rule.read.matrix is not None and self.rule.read.matrix(spec)

    def _known(self, specs: Sequence[TensorSpec]) -> dict[str, float]:
        """‖X‖² of the tensors of which it follows from what the last fold has kept of them."""
        generation, found = self.state.generation_of(self.commit), {}
        for spec in specs:
            kept = generation.square(spec.name) if generation is not None else 0.0
            square = None if kept is None else self.rule.read.square(spec, kept, self.totals)
            if square is not None:
                found[spec.name] = square
        return found

    def square(self, spec: TensorSpec, seen: Seen | None) -> float:
        """‖X‖² of one tensor; `seen` is given X. Raises Retry and Damaged."""
        if self.times_at(spec.name) and self.has_terms(spec):
            found, square = self._by_terms(spec)
        else:
            found = self.unit(spec)
            square = linalg.inner(found, found)
        if self.spool is not None and not self.elementwise(spec):
            with suppress(OSError):  # then it is made a second time
                self.spool.put(spec.name, found)
        if seen is not None:
            seen(spec, found)
        return square


def terms_need(reading: Reading, spec: TensorSpec) -> int:
    """Bytes that `terms` of a state of whole tensors takes beside what `need` says, with a product of its factors: of
    one layer three times both in float64, and X."""
    if reading.rule.factored is None or not reading.has_terms(spec):
        return 0
    part = spec.expert if spec.kind == "stack" else spec
    return 8 * (3 * reading.rule.factored.wide * min(sides(part)) * sum(sides(part)) + part.numel)


def _unit(reading: Reading, spec: TensorSpec, kept: Accumulators) -> torch.Tensor:
    """X of a tensor or of an expert, at scale 1, from what is kept of it."""
    read = reading.rule.read
    if read.elementwise(spec):
        return read.unit(spec, kept, reading.totals)
    with turn(pick_device(reading.device), reading.need(spec)) as device:
        there = {slot: value.to(device) for slot, value in kept.items()}
        return read.unit(spec, there, reading.totals).cpu()


def _totals_of(state: State, seq: int) -> Totals:
    """The totals at record `seq`, with those of each model where the records of all folds in force have them."""
    totals = state.ledger.totals_at(seq)
    if totals.matrices is None:
        return totals
    figures = [fold.entry.numbers.figures for fold in state.ledger.folds(seq)]
    return replace(totals, each=tuple(mine for mine in figures if mine is not None))


def digest_of(what: object, rule: Rule, options: ReadOptions) -> str:
    """A short digest of what is read, and how."""
    said = json.dumps([what, rule.name, dict(rule.options), options.to_mapping()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]
