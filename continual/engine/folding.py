"""One candidate's tensors through the rule, each on its own: read, subtract, fold, write. What it is worth as a whole
is the engine's to judge.

Where a rule works element by element a tensor goes through it in short runs that stay in the processor's cache, and is
never whole in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from blake3 import blake3

from continual.executors.contract import Task
from continual.gates import safety
from continual.records import TensorSpec
from continual.rules import Folded, Inputs, Measured, Rule
from continual.state import Transaction
from continual.tensors import TaskVectors
from continual.tensors.vectors import RUN, Content

RUN_ON_DEVICE = 1 << 22
"""Elements of a run on an accelerator: enough to be worth a transfer and a kernel."""


class Piece(NamedTuple):
    """What folding one tensor gave. `seconds` by stage: `read` of fine-tune and base, `rule`, `write` of the state (and
    reading what it was)."""

    digest: bytes
    sums: Mapping[str, float]
    notes: Mapping[str, float]
    nbytes: int
    seconds: Mapping[str, float]


class Folding:
    """Folds tensors of one candidate (called `name` in messages) with one weight in one transaction; `totals` are the
    rule's before it. Thread-safe."""

    def __init__(
        self,
        transaction: Transaction,
        vectors: TaskVectors,
        rule: Rule,
        totals: Mapping[str, float],
        name: str,
        device: torch.device,
        check: Callable[[], None],
        *,
        weight: float = 1.0,
    ) -> None:
        self.measured: Measured = {}
        self._weight = weight
        self._seeds: dict[str, int] = {}
        self._transaction = transaction
        self.vectors = vectors
        self._rule = rule
        self._totals = totals
        self._name = name
        self._device = device
        self._check = check

    def task(self, spec: TensorSpec, *, touched: bool) -> Task[Piece]:
        """The work of one tensor. `touched`: the candidate changes it; else only its norm is needed."""
        vectors = self.vectors
        if not touched:
            return Task(spec.name, need(self._rule, spec, None), partial(self._untouched, spec))
        run = self._by_runs if self._rule.elementwise(spec) else self._whole
        return Task(
            spec.name, need(self._rule, spec, vectors), partial(run, spec), partial(vectors.prefetch, spec.name)
        )

    def measuring(self, spec: TensorSpec, number: int, share: float) -> Task[torch.Tensor]:
        """The work of one tensor in pass `number` of what the rule measures before the fold, on that share of its
        elements."""
        vectors, measure = self.vectors, self._rule.measure
        assert measure is not None

        def run() -> torch.Tensor:
            self._check()
            counts = torch.zeros((), dtype=torch.int64)
            inputs = self._inputs(spec)
            for start, stop, tau in vectors.runs(spec.name, None, share=share):
                stands_for = round(min(vectors.run, spec.numel - start) / (stop - start))
                counts = counts + measure.tally(number, tau, inputs._replace(start=start)) * stands_for
            return counts

        need = vectors.nbytes(spec.name, whole=False) + 8 * 4 * vectors.run
        return Task(spec.name, need, run, partial(vectors.prefetch, spec.name) if share == 1.0 else None)

    def _whole(self, spec: TensorSpec) -> Piece:
        self._check()
        started = time.perf_counter()
        inputs = self._inputs(spec)
        tau, digest, nbytes = self.vectors.vector(spec.name)
        if self._rule.shipped is not None:
            content, moments = Content(), torch.empty(spec.numel)
            for start in range(0, spec.numel, self.vectors.run):
                stop = min(start + self.vectors.run, spec.numel)
                moments[start:stop] = self.vectors.moments(spec.name, start, stop, content)
            inputs = inputs._replace(moments=moments.view(spec.shape).to(self._device))
            digest, nbytes = blake3(digest + content.digest()).digest(), nbytes + content.nbytes
        read = time.perf_counter()
        folded = self._apply(inputs, tau)
        safety.finite(self._name, spec.name, folded.sums["tau_sq"])
        computed = time.perf_counter()
        if folded.sums["tau_sq"] == 0.0 and self._rule.shipped is None:
            self._transaction.keep(spec.name)
        else:
            for slot, value in folded.accumulators.items():
                self._transaction.write(spec.name, slot, value.to("cpu").contiguous().numpy())
        seconds = {"read": read - started, "rule": computed - read, "write": time.perf_counter() - computed}
        return Piece(digest, folded.sums, folded.notes, nbytes, seconds)

    def _by_runs(self, spec: TensorSpec) -> Piece:
        self._check()
        inputs = self._inputs(spec)
        clock, content = _Clock(), Content()
        reading = self.vectors.runs(spec.name, content)
        parts: list[Mapping[str, float]] = []
        for start, _, values in self._transaction.runs(spec.name, self.vectors.run):
            clock.ends("write")
            _, stop, tau = next(reading)
            given_inputs = inputs._replace(start=start)
            if self._rule.shipped is not None:
                given_inputs = given_inputs._replace(
                    moments=self.vectors.moments(spec.name, start, stop, content).to(self._device)
                )
            clock.ends("read")
            accumulators = {slot: torch.from_numpy(value) for slot, value in values.items()}
            given = {slot: value.to(self._device) for slot, value in accumulators.items()}
            folded = self._rule.fold(given, tau.to(self._device), given_inputs, self._totals)
            safety.finite(self._name, spec.name, folded.sums["tau_sq"])
            for slot, value in folded.accumulators.items():
                if value is not accumulators[slot]:
                    accumulators[slot].copy_(value)
            parts.append(folded.sums)
            clock.ends("rule")
        next(reading, None)
        sums = total(parts)
        if sums["tau_sq"] == 0.0 and self._rule.shipped is None:
            self._transaction.keep(spec.name)
        clock.ends("write")
        return Piece(content.digest(), sums, {}, content.nbytes, clock.seconds)

    def _untouched(self, spec: TensorSpec) -> Piece:
        """A tensor that this fine-tune leaves as it is: a zero task vector changes no accumulator, only its norm is
        needed."""
        folded = self._apply(Inputs(spec, self._weight, measured=self.measured), torch.zeros(spec.shape))
        self._transaction.keep(spec.name)
        return Piece(b"", folded.sums, {}, 0, {})

    def _apply(self, inputs: Inputs, tau: torch.Tensor) -> Folded:
        spec, slots = inputs.spec, self._rule.slots(inputs.spec)
        accumulators = {
            slot: torch.from_numpy(self._transaction.read(spec.name, slot)).to(self._device) for slot in slots
        }
        return self._rule.fold(accumulators, tau.to(self._device), inputs, self._totals)

    def _inputs(self, spec: TensorSpec) -> Inputs:
        """What the rule is given besides the task vector of a tensor that the candidate changes."""
        return Inputs(spec, self._weight, self._seed(spec.name) if self._rule.seeded else 0, self.measured)

    def _seed(self, name: str) -> int:
        """From the tensor's content and name, so that a fine-tune meets the same random choices wherever it lies. Reads
        the tensor once more."""
        if name not in self._seeds:
            content = Content()
            for _ in self.vectors.runs(name, content):
                pass
            self._seeds[name] = int.from_bytes(
                blake3(content.hash.digest() + name.encode()).digest(length=16), "little"
            )
        return self._seeds[name]


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ends(self, stage: str) -> None:
        """What passed since the last call was `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums of several tensors, or runs of one, added exactly: their order does not matter. What a part does not
    have counts as 0."""
    keys = {key for part in parts for key in part} or {"tau_sq", "dot", "merged_sq"}
    return {key: math.fsum(part.get(key, 0.0) for part in parts) for key in sorted(keys)}


def run_length(device: torch.device) -> int:
    """Elements of a run on this device."""
    return RUN if device.type == "cpu" else RUN_ON_DEVICE


def need(rule: Rule, spec: TensorSpec, vectors: TaskVectors | None) -> int:
    """Peak bytes of folding one tensor; without `vectors`, of one that the candidate does not change."""
    slots = rule.slots(spec).values()
    if vectors is None:
        return 4 * spec.numel + sum(slot.nbytes for slot in slots) + rule.workspace(spec)
    if rule.elementwise(spec):
        share = min(1.0, vectors.run / max(1, spec.numel))
        return (
            vectors.nbytes(spec.name, whole=False)
            + int(share * sum(slot.nbytes for slot in slots))
            + rule.workspace(spec)
        )
    return vectors.nbytes(spec.name) + sum(slot.nbytes for slot in slots) + rule.workspace(spec)


def state_bytes(rule: Rule, specs: Sequence[TensorSpec]) -> int:
    """Bytes of one generation, without its metadata."""
    return sum(slot.nbytes for spec in specs if spec.kind != "carried" for slot in rule.slots(spec).values())
