"""The tensors of one candidate through the rule, each on its own: read, subtract, fold, write. Which process folds
which of them is the matter of fold_orders.py, and nothing here judges the candidate as a whole.

Where a rule works element by element, a tensor goes through it in short runs that stay in the cache of the processor.
Then it is never whole in memory, and it is computed on the CPU: to copy it to an accelerator and back takes longer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

from blake3 import blake3

from continual import linalg
from continual.engine.needs import on_device
from continual.engine.passes import by_runs, counts_of
from continual.engine.resources import Workplace
from continual.engine.untouched import Ahead, square_of
from continual.executors.device import turn
from continual.executors.memory import Memory
from continual.gates import Gates, TensorNumbers
from continual.hub.marks import FilesRead
from continual.lazily import torch
from continual.records import SlotSpec, TensorSpec, Totals
from continual.rules import Counts, Folded, Inputs, Pass, Rule, Sums, first_of, last_out
from continual.state.arrays import Array
from continual.state.attempts import Written
from continual.state.writing import Writing
from continual.tensors import TaskVectors
from continual.tensors.vectors.added import Content
from continual.tensors.vectors.sketch import Picture, SketchPlan, Watched


class TensorFold(NamedTuple):
    """What folding one tensor gave.

    `digest`: of what its task vector was made from. `sums` and `notes`: as the rule returned them; of a stack the sums
    of all experts, and the notes of each. `nbytes`: bytes read. `seconds` by stage: `read` of fine-tune and base,
    `rule`, `write` of the state (and reading what it was). `rank`: the sum of the ranks in the tensor after it, where
    the rule goes by that and it is known. `picture`: of the task vector; None of one that is zero. `written`: what
    another process wrote of it into the transaction, which has to take that; None where it was written there.
    `before_sq`: ‖X‖² before it, where that is known. `read`: what another process read of a candidate on the Hub, for
    this tensor and those before it.
    """

    digest: bytes
    sums: Sums
    notes: tuple[Mapping[str, float], ...]
    nbytes: int
    seconds: Mapping[str, float]
    rank: int | None = None
    picture: Picture | None = None
    written: Written | None = None
    before_sq: float | None = None
    read: FilesRead | None = None


class Terms(NamedTuple):
    """How one candidate is folded: its name in messages, the rule, the rule's totals before the fold, the weight, how
    its tensors are sketched."""

    name: str
    rule: Rule
    totals: Totals
    weight: float
    plan: SketchPlan


@dataclass(frozen=True)
class Counted:
    """What the passes before a fold found: of the whole model, and of tensors by name, where those have passes of their
    own."""

    model: object = None
    own: Mapping[str, object] = field(default_factory=dict)

    def of(self, name: str) -> object:
        """What is known for a tensor."""
        return self.own.get(name, self.model)


class Folding:
    """Folds tensors of one candidate; `into` says where to. Thread-safe.

    The gates are asked of each tensor. Where continual is stopping, the tensor that comes next raises Abandoned.
    """

    _transaction: Writing

    def __init__(self, vectors: TaskVectors, terms: Terms, gates: Gates, workplace: Workplace) -> None:
        self.counted = Counted()
        self._vectors = vectors
        self._terms = terms
        self._rule = terms.rule
        self._gates = gates
        self._workplace = workplace
        self._device = workplace.device
        self._seed = cache(partial(seed_of, vectors))
        self._memory = Memory(pinned=self._device.type == "cuda")
        self._is_last_out = last_out(terms.totals, terms.weight)

    def into(self, writing: Writing) -> Folding:
        """The same, which writes there."""
        found = copy.copy(self)
        found._transaction = writing
        return found

    def work(self, names: Sequence[str]) -> list[TensorFold]:
        """Folds tensors, one after the other. Raises Refuse, Retry, Abandoned."""
        return [self.fold(name) for name in names]

    def close(self) -> None:
        """Nothing: who opened the files closes them."""

    def fold(self, name: str) -> TensorFold:
        """Folds one tensor. Raises as `work`."""
        spec = self._vectors.spec(name)
        if not self._vectors.has(name):
            return self.left(spec)
        before = self._transaction.square(name)
        if by_runs(self._rule, spec):
            found = self._by_runs(spec)
        else:
            found = self._by_experts(spec) if spec.kind == "stack" else self._whole(spec)
        return found._replace(before_sq=before)

    def _whole(self, spec: TensorSpec) -> TensorFold:
        with held(self._memory, spec, self._rule.slots(spec)) as (tau, kept):
            return self._whole_in(spec, tau, kept)

    def _whole_in(self, spec: TensorSpec, into: torch.Tensor, kept: Mapping[str, Array]) -> TensorFold:
        """`_whole`: task vector and accumulators in memory that other tensors had before, and will have."""
        self._workplace.go_on(self._terms.name)
        started = time.perf_counter()
        inputs = self._ranked(spec)
        tau, digest, nbytes = self._vectors.vector(spec.name, into)
        if self._is_nothing(tau):
            return self.left(spec)._replace(
                digest=digest, nbytes=nbytes, seconds={"read": time.perf_counter() - started}
            )
        if self._rule.needs.shipped is not None:
            content = Content()
            inputs = inputs._replace(moments=moments_of(self._vectors, spec, 0, content))
            digest = blake3(digest + content.digest()).digest()
            nbytes += content.nbytes
        read = time.perf_counter()
        watched = Watched(spec, self._terms.plan)
        watched.add(0, tau.reshape(-1).numpy())
        accumulators = {
            slot: torch.from_numpy(self._transaction.read(spec.name, slot, memory)) for slot, memory in kept.items()
        }
        tell_before(watched, accumulators, 0)
        folded = self._apply(accumulators, tau, inputs)
        computed = time.perf_counter()
        if not self._kept(spec, folded.sums):
            for slot, value in folded.accumulators.items():
                self._transaction.write(spec.name, slot, value.contiguous().numpy())
        seconds = {"read": read - started, "rule": computed - read, "write": time.perf_counter() - computed}
        added = self._vectors.rank(spec.name)
        rank = None if inputs.rank is None or added is None else inputs.rank + added
        notes, picture = (folded.notes,) if folded.notes else (), watched.picture(self._vectors.grids.get(spec.name))
        return TensorFold(digest, folded.sums, notes, nbytes, seconds, rank, picture)

    def _by_experts(self, spec: TensorSpec) -> TensorFold:
        """A stack, one expert after the other, each as a matrix of its own: no more than one is in memory."""
        self._workplace.go_on(self._terms.name)
        one = spec.expert
        inputs = self._ranked(spec)._replace(spec=one)
        slots = self._rule.slots(one)
        clock, content, shipped = _Clock(), Content(), Content()
        reading = Ahead(self._vectors.experts(spec, content), self._is_nothing)
        if reading.nothing:
            clock.ends("read")
            return self.left(spec)._replace(digest=content.digest(), nbytes=content.nbytes, seconds=clock.seconds)
        found: list[Folded] = []
        watched = Watched(spec, self._terms.plan)
        for values in self._transaction.parts(spec.name, spec.experts):
            clock.ends("write")
            tau = reading.next(one.shape)
            start = len(found) * one.numel
            here = inputs._replace(start=start)
            if self._rule.needs.shipped is not None:
                here = here._replace(moments=moments_of(self._vectors, one, start, shipped))
            clock.ends("read")
            accumulators = {slot: torch.from_numpy(value).view(slots[slot].shape) for slot, value in values.items()}
            folded = self._apply_in_place(accumulators, tau, here, watched)
            found.append(folded._replace(accumulators={}))
            clock.ends("rule")
        reading.end()
        sums = Sums.total([folded.sums for folded in found])
        digest, nbytes = content.digest(), content.nbytes
        if self._rule.needs.shipped is not None:
            digest, nbytes = blake3(digest + shipped.digest()).digest(), nbytes + shipped.nbytes
        self._kept(spec, sums)
        clock.ends("write")
        notes = tuple(folded.notes for folded in found if folded.notes)
        return TensorFold(
            digest, sums, notes, nbytes, clock.seconds, picture=watched.picture(self._vectors.grids.get(spec.name))
        )

    def _by_runs(self, spec: TensorSpec) -> TensorFold:
        self._workplace.go_on(self._terms.name)
        inputs = self._ranked(spec)
        clock, content = _Clock(), Content()
        reading = Ahead((tau for _, _, tau in self._vectors.runs(spec.name, content)), self._is_nothing)
        if reading.nothing:
            clock.ends("read")
            return self.left(spec)._replace(digest=content.digest(), nbytes=content.nbytes, seconds=clock.seconds)
        parts: list[Sums] = []
        watched = Watched(spec, self._terms.plan)
        for start, stop, values in self._transaction.runs(spec.name, self._vectors.run):
            clock.ends("write")
            tau = reading.next((stop - start,))
            here = inputs._replace(start=start)
            if self._rule.needs.shipped is not None:
                here = here._replace(moments=self._vectors.moments(spec.name, start, stop, content))
            clock.ends("read")
            accumulators = {slot: torch.from_numpy(value) for slot, value in values.items()}
            parts.append(self._apply_in_place(accumulators, tau, here, watched).sums)
            clock.ends("rule")
        reading.end()
        self._kept(spec, sums := Sums.total(parts))
        clock.ends("write")
        return TensorFold(
            content.digest(),
            sums,
            (),
            content.nbytes,
            clock.seconds,
            picture=watched.picture(self._vectors.grids.get(spec.name)),
        )

    def _apply_in_place(
        self, accumulators: dict[str, torch.Tensor], tau: torch.Tensor, inputs: Inputs, watched: Watched
    ) -> Folded:
        """Asks the rule about a part of a tensor, and the gates about that part; `accumulators` get what the rule makes
        of them."""
        watched.add(inputs.start, tau.reshape(-1).numpy())
        tell_before(watched, accumulators, inputs.start)
        folded = self._apply(accumulators, tau, inputs)
        for slot, value in folded.accumulators.items():
            if value is not accumulators[slot]:
                accumulators[slot].copy_(value)
        return folded

    def _apply(self, accumulators: dict[str, torch.Tensor], tau: torch.Tensor, inputs: Inputs) -> Folded:
        """Asks the rule about a tensor or a part of one, and the gates about that. All is given on the CPU, and comes
        back there: from an accelerator in the memory of `accumulators`."""
        rule, totals = self._rule, self._terms.totals
        if self._device.type == "cpu" or by_runs(rule, inputs.spec):
            folded = rule.fold.apply(accumulators, tau, inputs, totals)
        else:
            with turn(self._device, on_device(rule, inputs.spec)) as device:
                there = {slot: value.to(device) for slot, value in accumulators.items()}
                moments = None if inputs.moments is None else inputs.moments.to(device)
                folded = rule.fold.apply(there, tau.to(device), inputs._replace(moments=moments), totals)
                back = {slot: accumulators[slot].copy_(value) for slot, value in folded.accumulators.items()}
                folded = folded._replace(accumulators=back)
        self._gates.at_tensor(TensorNumbers(self._terms.name, inputs.spec.name, folded.sums.tau_sq))
        return folded

    def _is_nothing(self, tau: torch.Tensor) -> bool:
        """Whether folding `tau`, of a tensor or part of it, changes nothing: it is zero, with nothing shipped."""
        beginning = tau.view(-1)[: linalg.ROW]  # says it of nearly all
        return self._rule.needs.shipped is None and not (bool(beginning.any()) or bool(tau.any()))

    def left(self, spec: TensorSpec, square: float | None = None) -> TensorFold:
        """A tensor whose task vector is zero: that changes no accumulator (ops/decisions/0040). `square` is ‖X‖² where
        the caller knows it. Where the last model is taken out, what rounding left becomes exact zeros."""
        self._workplace.go_on(self._terms.name)
        if self._is_last_out:
            self._transaction.clear(spec.name)
            square = 0.0
        else:
            self._transaction.keep(spec.name)
            square = self._transaction.square(spec.name) if square is None else square
            if square is None:
                inputs = Inputs(spec, self._terms.weight, measured=self.counted.model)
                square = square_of(self._transaction, self._rule, inputs, self._terms.totals, self._device)
        figure = 0.0 if self._rule.read.matrix is not None and self._rule.read.matrix(spec) else None
        return TensorFold(
            b"", Sums(merged_sq=square, matrix_sq=figure, top_sq=figure), (), 0, {}, self._rank(spec.name)
        )

    def _kept(self, spec: TensorSpec, sums: Sums) -> bool:
        """Whether transforms before the rule left nothing of a task vector; the tensor is kept as it was then."""
        nothing = sums.tau_sq == 0.0 and self._rule.needs.shipped is None and not self._is_last_out
        if nothing:
            self._transaction.keep(spec.name)
        return nothing

    def counts(self, name: str, measure: Pass) -> Counts:
        """What a pass counts in one tensor. Raises Refuse, Retry, Abandoned."""
        self._workplace.go_on(self._terms.name)
        return counts_of(self._vectors, self._inputs(self._vectors.spec(name)), measure)

    def _inputs(self, spec: TensorSpec) -> Inputs:
        """What the rule is given besides the task vector, for a tensor that the candidate changes."""
        seed = self._seed(spec.name) if self._rule.needs.seeded else 0
        return Inputs(spec, self._terms.weight, seed, self.counted.of(spec.name))

    def _ranked(self, spec: TensorSpec) -> Inputs:
        """The same for a fold: with the ranks of what the tensor has."""
        rank = self._rank(spec.name) if self._vectors.rank(spec.name) is not None else None
        return self._inputs(spec)._replace(rank=rank)

    def _rank(self, name: str) -> int | None:
        return self._transaction.rank(name) if self._rule.needs.ranks else None


def seed_of(vectors: TaskVectors, name: str) -> int:
    """A seed from a tensor's content and name, so that the random choices do not depend on where a fine-tune lies. It
    takes one more pass over the tensor."""
    content = Content()
    for _ in vectors.runs(name, content):
        pass
    return int.from_bytes(blake3(content.hash.digest() + name.encode()).digest(length=16), "little")


@contextmanager
def held(
    memory: Memory, spec: TensorSpec, slots: Mapping[str, SlotSpec]
) -> Iterator[tuple[torch.Tensor, dict[str, Array]]]:
    """Memory that other tensors had before, and will have: for a task vector, flat float32, and for the accumulators of
    its tensor."""
    with memory.take([4 * spec.numel, *(slot.nbytes for slot in slots.values())]) as (first, *parts):
        arrays = {
            name: part.view(slot.dtype).reshape(slot.shape)
            for (name, slot), part in zip(slots.items(), parts, strict=True)
        }
        yield torch.from_numpy(first).view(torch.float32), arrays


def tell_before(watched: Watched, accumulators: dict[str, torch.Tensor], start: int) -> None:
    """Tells of the merge before the fold, from element `start` on, where it is asked for and one product away."""
    count = watched.wanted(start)
    if count and (found := first_of(accumulators, count)) is not None:
        watched.beside(start, found.float().numpy())


def moments_of(vectors: TaskVectors, spec: TensorSpec, first: int, content: Content) -> torch.Tensor:
    """What was shipped for a whole tensor, or for the expert of a stack that begins at element `first`."""
    moments = torch.empty(spec.numel)
    for start in range(0, spec.numel, vectors.run):
        stop = min(start + vectors.run, spec.numel)
        moments[start:stop] = vectors.moments(spec.name, first + start, first + stop, content)
    return moments.view(spec.shape)


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ends(self, stage: str) -> None:
        """Counts the time since the last call as time of `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
