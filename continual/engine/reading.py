"""The merged model of a state at one record: its task vectors, as long as the read-time options make them. No file
formats; export writes what is read here."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from continual import linalg
from continual.executors.contract import Executor, Progress, Task
from continual.records import TensorSpec
from continual.rules import ReadOptions, Rule, Size
from continual.rules.matrices import sides
from continual.state import Commit, State

Seen = Callable[[TensorSpec, torch.Tensor], None]
Parts = tuple[float, float]


class Reading:
    """What `state` holds at record `seq` (default: the newest), read with `options` (default: those in force there).
    Thread-safe once it is settled.

    Where the totals do not know how long the merged task vector is and the options ask for a length, it is measured
    once by a pass over all tensors, which costs what reading them costs; `lengths` keeps what was measured, by
    generation: ‖X‖ over the matrices and over everything else.
    """

    def __init__(
        self,
        state: State,
        rule: Rule,
        seq: int | None = None,
        options: ReadOptions | None = None,
        lengths: dict[str, Parts] | None = None,
    ) -> None:
        self.state = state
        self.rule = rule
        self.commit: Commit = state.ledger.head if seq is None else state.ledger.get(seq)
        self.totals = state.ledger.totals_at(self.commit.seq)
        self.options = options or ReadOptions.from_mapping(state.ledger.read_options(self.commit.seq))
        self.lengths = {} if lengths is None else lengths
        self._factors: Parts | None = None

    def settle(self, executor: Executor, progress: Progress) -> float:
        """Finds out what the merged task vector is multiplied by; returns s, of the matrices where it is not the same
        for all."""
        if self._factors is None:
            if self.options.needs(self.size()) and self.commit.generation is not None:
                self.measure(executor, progress)
            self._factors = self.options.factors(self.totals, self.size())
        return self._factors[0]

    def factor(self) -> float | None:
        """s where it takes no pass to know it, None where it would."""
        if self._factors is not None:
            return self._factors[0]
        return None if self.options.needs(self.size()) else self.options.factors(self.totals, self.size())[0]

    def size(self) -> Size:
        """How long X is, as far as it is known."""
        size = self.rule.read.size(self.totals)
        if self.commit.generation is None:
            return Size(0.0, size.most, (0.0, 0.0))
        parts = self.lengths.get(self.commit.generation)
        return (
            size
            if parts is None
            else Size(math.hypot(*parts) if size.length is None else size.length, size.most, parts)
        )

    def unit(self, spec: TensorSpec) -> torch.Tensor:
        """What the rule reads at scale 1: float32 of the tensor's shape, in new memory."""
        slots = self.state.format.slots[spec.name]
        accumulators = {slot: torch.from_numpy(self.state.read(spec.name, slot, at=self.commit.seq)) for slot in slots}
        return self.rule.read.unit(spec, accumulators, self.totals)

    def vector(self, spec: TensorSpec) -> torch.Tensor:
        """The merged task vector of one tensor, before any cast: float32 of the tensor's shape, in new memory."""
        assert self._factors is not None, "settle first"
        return self.unit(spec).mul_(self._factors[0 if self._is_matrix(spec) else 1] * self.options.layer(spec))

    def need(self, spec: TensorSpec) -> int:
        """Peak bytes of reading one tensor; of a matrix, as much as a decomposition takes."""
        decomposed = linalg.workspace(*sides(spec)) if self._is_matrix(spec) else 0
        return sum(slot.nbytes for slot in self.rule.slots(spec).values()) + 8 * spec.numel + decomposed

    def measure(self, executor: Executor, progress: Progress, seen: Seen | None = None) -> float:
        """‖X‖ over the whole model, by reading it; `seen` is given every tensor that is read, on the thread that read
        it."""
        specs = [spec for spec in self.state.format.tensors if spec.kind != "carried"]
        tasks = [Task(spec.name, self.need(spec), partial(self._square, spec, seen)) for spec in specs]
        squares: tuple[list[float], list[float]] = ([], [])
        progress("measure", 0, len(tasks))
        kinds = {spec.name: 0 if self._is_matrix(spec) else 1 for spec in specs}
        for done, (name, square) in enumerate(executor.map(tasks), 1):
            squares[kinds[name]].append(square)
            progress("measure", done, len(tasks))
        parts = (math.sqrt(math.fsum(squares[0])), math.sqrt(math.fsum(squares[1])))
        if self.commit.generation is not None:
            self.lengths[self.commit.generation] = parts
        return math.hypot(*parts)

    def _is_matrix(self, spec: TensorSpec) -> bool:
        return self.rule.read.matrix is not None and self.rule.read.matrix(spec)

    def _square(self, spec: TensorSpec, seen: Seen | None) -> float:
        found = self.unit(spec)
        if seen is not None:
            seen(spec, found)
        return linalg.inner(found, found)
