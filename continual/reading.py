"""The merged model of a state at one record: its task vectors, as long as the read-time options make them. No file formats; export writes what is read here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch

from continual import linalg
from continual.executors.contract import Executor, Progress, Task
from continual.records import TensorSpec
from continual.rules import ReadOptions, Rule
from continual.state import Commit, State


class Reading:
    """What `state` holds at record `seq` (default: the newest), read with `options` (default: those in force there). Thread-safe once it is settled.

    Where the totals do not know how long the merged task vector is and the options ask for a length, it is measured once by a pass over all tensors, which
    costs what reading them costs; `lengths` keeps what was measured, by generation.
    """

    def __init__(
        self,
        state: State,
        rule: Rule,
        seq: int | None = None,
        options: ReadOptions | None = None,
        lengths: dict[str, float] | None = None,
    ) -> None:
        self.state = state
        self.rule = rule
        self.commit: Commit = state.head if seq is None else state.get(seq)
        self.totals: Mapping[str, float] = state.totals_at(self.commit.seq)
        self.options = options or ReadOptions.from_mapping(state.read_options_at(self.commit.seq))
        self._lengths = {} if lengths is None else lengths
        self._factor: float | None = None

    def settle(self, executor: Executor, progress: Progress) -> float:
        """Finds out what the merged task vector is multiplied by, s; returns it."""
        if self._factor is None:
            size = self.rule.size(self.totals)
            length = size.length if self.options.policy != "norm" or size.length is not None else self._measure(executor, progress)
            self._factor = self.options.factor(self.totals, length or 0.0, size.most)
        return self._factor

    def factor(self) -> float | None:
        """s where it takes no pass to know it, None where it would."""
        size = self.rule.size(self.totals)
        length = self._lengths.get(self.commit.generation or "") if size.length is None else size.length
        if self._factor is None and self.options.policy == "norm" and length is None:
            return None
        return self.options.factor(self.totals, length or 0.0, size.most) if self._factor is None else self._factor

    def unit(self, spec: TensorSpec) -> torch.Tensor:
        """What the rule reads at scale 1: float32 of the tensor's shape, in new memory."""
        slots = self.state.format.slots[spec.name]
        accumulators = {slot: torch.from_numpy(self.state.read(spec.name, slot, at=self.commit.seq)) for slot in slots}
        return self.rule.read(spec, accumulators, self.totals)

    def vector(self, spec: TensorSpec) -> torch.Tensor:
        """The merged task vector of one tensor, before any cast: float32 of the tensor's shape, in new memory."""
        assert self._factor is not None, "settle first"
        return self.unit(spec).mul_(self._factor * self.options.layer(spec))

    def need(self, spec: TensorSpec) -> int:
        """Peak bytes of reading one tensor."""
        return sum(slot.nbytes for slot in self.rule.slots(spec).values()) + 8 * spec.numel

    def _measure(self, executor: Executor, progress: Progress) -> float:
        """‖X‖ over the whole model, by reading it."""
        generation = self.commit.generation
        if generation is None:
            return 0.0
        if generation not in self._lengths:
            specs = [spec for spec in self.state.format.tensors if spec.kind != "carried"]
            tasks = [Task(spec.name, self.need(spec), partial(self._square, spec)) for spec in specs]
            parts = []
            progress("measure", 0, len(tasks))
            for _, square in executor.map(tasks):
                parts.append(square)
                progress("measure", len(parts), len(tasks))
            self._lengths[generation] = math.sqrt(math.fsum(parts))
        return self._lengths[generation]

    def _square(self, spec: TensorSpec) -> float:
        found = self.unit(spec)
        return linalg.inner(found, found)
