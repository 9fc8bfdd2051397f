"""What coefficients are learned for, and how the loss changes with each: one for each layer of the merged task vector,
or one for each model's term in each layer, where what is read is a sum of such terms.

X, or its terms, are made once and kept in a file while coefficients are learned. The file is no part of the state.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from continual import linalg
from continual.engine.block_reading import BlockReading
from continual.engine.reading import Reading, terms_need
from continual.engine.spool import Spool
from continual.executors.contract import Executor, Progress, Task
from continual.lazily import Tensor, torch
from continual.records import TensorSpec
from continual.rules import ReadOptions, Size, check_terms
from continual.rules.matrices import sides
from continual.rules.scale import layer_key
from continual.state.durable import environment
from continual.state.transaction import room
from continual.tuning import scratch


class Coefficients(ABC):
    """Numbers that a reading is learned with, each by its place among `layers`, the layer that it is in. Closed with
    what `held` closes."""

    layers: Sequence[str]

    @abstractmethod
    def options(self, factors: Sequence[float]) -> ReadOptions:
        """What is read at the start, with each number multiplied by its factor."""

    @abstractmethod
    def reading(self, options: ReadOptions) -> Reading:
        """What is read with these options, out of the file."""

    @abstractmethod
    def slopes(self, now: Reading, spec: TensorSpec, gradient: Tensor) -> Iterator[tuple[int, float]]:
        """Of `gradient`, that of the loss of some rows in a tensor where the model is as `now` reads it: what it says
        of each number, as the slope along the logarithm of its factor. What costs much of each gradient is left to
        `rest`. Raises Retry."""

    def rest(self, now: Reading) -> Iterator[tuple[str, int, float]]:  # noqa: ARG002 - as of those that leave some
        """What the sum of all gradients since the last call says besides: with the name of the tensor. Raises Retry."""
        return iter(())


class OfLayers(Coefficients):
    """One number for each layer."""

    def __init__(
        self, reading: Reading, specs: Sequence[TensorSpec], work: Path, run: tuple[Executor, Progress], held: ExitStack
    ) -> None:
        """`specs`: the tensors that are learned for; the file goes to `work`. Raises Retry."""
        room(work, scratch.nbytes(reading), "tuning")
        self.reading_of = held.enter_context(scratch.written(reading, work, *run))
        self.layers = sorted({layer_key(spec.name) for spec in specs})
        self._start, self._places = reading.options, {key: place for place, key in enumerate(self.layers)}

    def options(self, factors: Sequence[float]) -> ReadOptions:
        """As of all."""
        return layered(self._start, dict(zip(self.layers, factors, strict=True)))

    def reading(self, options: ReadOptions) -> Reading:
        """As of all."""
        return self.reading_of(options)

    def slopes(self, now: Reading, spec: TensorSpec, gradient: Tensor) -> Iterator[tuple[int, float]]:
        """As of all: ⟨g, v⟩, v being the merged task vector."""
        vector = now.vector(spec).to(gradient.device)
        yield self._places[layer_key(spec.name)], linalg.dot(gradient, vector)


class OfTerms(Coefficients):
    """One number for the term of each model in each layer. What is no sum of terms, as what is no matrix in a state of
    whole tensors, has one for each layer."""

    def __init__(
        self, reading: Reading, specs: Sequence[TensorSpec], work: Path, run: tuple[Executor, Progress], held: ExitStack
    ) -> None:
        """As of `OfLayers`. Raises Misconfigured where the rule reads no sum of terms, Retry."""
        check_terms(reading.rule, blocks=isinstance(reading, BlockReading))
        reading.settle(*run)
        self._of, self._start = reading, reading.options
        self._terms = held.enter_context(KeptTerms(reading, work))
        self._terms.write(*run)
        places: dict[tuple[str, str], int] = {}
        for spec in specs:
            layer = layer_key(spec.name)
            if not reading.has_terms(spec):
                places.setdefault(("", layer), len(places))
            for number in sorted({n for one in spec.layers for n in self._terms.owner.get(one.name, ())}):
                places.setdefault((reading.keys[number], layer), len(places))
        self._places, self.layers = places, [layer for _, layer in places]
        summed = [] if isinstance(reading, BlockReading) else [spec for spec in specs if reading.has_terms(spec)]
        self._sums = held.enter_context(SummedGradients(summed, work))

    def options(self, factors: Sequence[float]) -> ReadOptions:
        """As of all."""
        changed = {key: factor for key, factor in zip(self._places, factors, strict=True) if factor != 1.0}
        start = layered(self._start, {layer: factor for (model, layer), factor in changed.items() if not model})
        return replace(start, terms=start.terms.times({key: factor for key, factor in changed.items() if key[0]}))

    def reading(self, options: ReadOptions) -> Reading:
        """As of all."""
        return TermsReading(self._of, self._terms, options)

    def slopes(self, now: Reading, spec: TensorSpec, gradient: Tensor) -> Iterator[tuple[int, float]]:
        """As of all: ⟨g, s·c_i·X_i⟩ of each model, from the sums of L ∘ gR over the columns of X_i = L·Rᵀ. Of whole
        tensors there are as many columns as rows, and more, so that this is done once for all rows."""
        layer = layer_key(spec.name)
        if not self._of.has_terms(spec):
            yield self._places[("", layer)], linalg.dot(gradient, now.vector(spec).to(gradient.device))
        elif spec.name in self._sums.specs:
            self._sums.add(spec, gradient)
        else:
            yield from self._of_terms(now, spec, gradient)

    def rest(self, now: Reading) -> Iterator[tuple[str, int, float]]:
        """As of all."""
        for spec, gradient in self._sums.taken():
            yield from ((spec.name, *found) for found in self._of_terms(now, spec, gradient))

    def _of_terms(self, now: Reading, spec: TensorSpec, gradient: Tensor) -> Iterator[tuple[int, float]]:
        layer = layer_key(spec.name)
        scale, times = now.factor_of(spec), now.times_at(spec.name)
        sums: dict[int, list[float]] = {}
        for place, one in enumerate(spec.layers):
            left, right = self._terms.read(one)
            matrix = gradient.reshape(len(spec.layers), *sides(one))[place].float()
            each = ((left.to(matrix.device) @ matrix) * right.to(matrix.device)).double().sum(1).tolist()
            for number, dot in zip(self._terms.owner.get(one.name, ()), each, strict=True):
                sums.setdefault(number, []).append(dot)
        for number, dots in sums.items():
            slope = sum(dots) * scale * times.get(number, 1.0)
            yield self._places[(self._of.keys[number], layer)], slope


class SummedGradients:
    """The gradients of some tensors, added up in a file without a name. A context manager."""

    def __init__(self, specs: Sequence[TensorSpec], work: Path) -> None:
        """Raises Retry where the disk of `work` has no room."""
        self.specs = {spec.name: spec for spec in specs}
        self._there: set[str] = set()
        room(work, 4 * sum(spec.numel for spec in specs), "tuning")
        with environment(f"cannot write in {work}"):
            self._spool = Spool(work, {spec.name: spec.numel for spec in specs})

    def __enter__(self) -> SummedGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, spec: TensorSpec, gradient: Tensor) -> None:
        """Adds one, of as many elements as the tensor has. Raises Retry."""
        found = gradient.detach().reshape(-1).float().cpu()
        with environment("cannot write the scratch file"):
            if spec.name in self._there:
                before = self._spool.get(spec.name, (spec.numel,))
                assert before is not None, "it was put there"
                found = before.add_(found)
            self._spool.put(spec.name, found)
        self._there.add(spec.name)

    def taken(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Each sum, flat, on the CPU; then they begin anew. Raises Retry."""
        there, self._there = sorted(self._there), set()
        for name in there:
            with environment("cannot read the scratch file"):
                found = self._spool.get(name, (self.specs[name].numel,))
            assert found is not None, "it was put there"
            yield self.specs[name], found


class KeptTerms:
    """The terms of a reading in a file without a name: of each layer the columns of both factors as rows, float32, and
    in memory whose they are (`owner`, by layer). What is no sum of terms is kept as it is. A context manager."""

    def __init__(self, of: Reading, work: Path) -> None:
        """Raises Retry where the disk of `work` has no room."""
        self._of, self.owner = of, dict[str, Sequence[int]]()
        specs = [spec for spec in of.state.format.tensors if spec.kind != "carried"]
        self._specs = {spec.name: spec for spec in specs}
        sizes: dict[str, int] = {}
        for spec in specs:
            if not of.has_terms(spec):
                sizes[spec.name] = spec.numel
            for one in spec.layers if of.has_terms(spec) else ():
                (m, n), most = sides(one), columns_of(of, one)
                sizes |= {f"{one.name} left": most * m, f"{one.name} right": most * n}
        room(work, 4 * sum(sizes.values()), "tuning")
        with environment(f"cannot write in {work}"):
            self._spool = Spool(work, sizes)

    def __enter__(self) -> KeptTerms:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def write(self, executor: Executor, progress: Progress) -> None:
        """Reads all of them. Raises Retry and Damaged."""
        of, whole = self._of, not isinstance(self._of, BlockReading)
        needs = {name: of.need(spec) + (terms_need(of, spec) if whole else 0) for name, spec in self._specs.items()}
        tasks = [Task(name, needs[name], partial(self._write, spec)) for name, spec in self._specs.items()]
        progress("measure", 0, len(tasks))
        for done, (_, found) in enumerate(executor.map(tasks), 1):
            self.owner |= found
            progress("measure", done, len(tasks))

    def _write(self, spec: TensorSpec) -> dict[str, Sequence[int]]:
        if not self._of.has_terms(spec):
            self._put(spec.name, self._of.unit(spec))
            return {}
        found = {}
        for one, (left, right, owner) in zip(spec.layers, self._of.terms(spec), strict=True):
            self._put(f"{one.name} left", left.mT.float())
            self._put(f"{one.name} right", right.mT.float())
            found[one.name] = owner
        return found

    def read(self, one: TensorSpec) -> tuple[Tensor, Tensor]:
        """The factors of one layer, k×m and k×n float32. Raises Retry."""
        (m, n), k = sides(one), len(self.owner.get(one.name, ()))
        return self._get(f"{one.name} left", (k, m)), self._get(f"{one.name} right", (k, n))

    def plain(self, spec: TensorSpec) -> Tensor:
        """X of a tensor that is no sum of terms. Raises Retry."""
        return self._get(spec.name, spec.shape)

    def _put(self, name: str, values: Tensor) -> None:
        with environment("cannot write the scratch file"):
            self._spool.put(name, values)

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        with environment("cannot read the scratch file"):
            found = self._spool.get(name, shape)
        assert found is not None, "all of them were written"
        return found


class TermsReading(Reading):
    """Reads the merged model that `of` reads, under `options`, with X from its terms in a file: what the rule would
    read up to rounding, without the work of that."""

    kept_by_elements = False
    stored = False

    def __init__(self, of: Reading, kept: KeptTerms, options: ReadOptions) -> None:
        super().__init__(of.state, of.rule, of.commit.seq, options, of.lengths)
        self.rule, self.totals = of.rule, of.totals
        self._of, self._terms = of, kept
        self.keys = of.keys

    def size(self) -> Size:
        """How long X is, which was measured before."""
        return self._of.size()

    def unit(self, spec: TensorSpec) -> Tensor:
        """X of one tensor with the coefficients: float32, of the tensor's shape, in new memory."""
        if not self._of.has_terms(spec):
            return self._terms.plain(spec)
        times, parts = self.times_at(spec.name), []
        for one in spec.layers:
            left, right = self._terms.read(one)
            each = torch.tensor([times.get(number, 1.0) for number in self._terms.owner.get(one.name, ())])
            parts.append((left.mT * each) @ right if len(left) else torch.zeros(sides(one)))
        return torch.cat([part.reshape(-1) for part in parts]).view(spec.shape)

    def need(self, spec: TensorSpec) -> int:
        """Peak bytes of reading one tensor: it, and of one layer of it both factors and what one of them becomes."""
        columns = max((columns_of(self._of, one) * sum(sides(one)) for one in spec.layers), default=0)
        return 8 * spec.numel + 8 * (columns if self._of.has_terms(spec) else 0)

    def made_from(self, spec: TensorSpec) -> object:  # noqa: ARG002 - as of every reading
        """Another word each time: nothing is taken of what is written for a trial."""
        return secrets.token_hex(8)


def columns_of(reading: Reading, layer: TensorSpec) -> int:
    """How many columns the factors of the terms of a matrix have at most."""
    assert reading.rule.factored is not None, reading.rule.name
    triplets = reading.columns(layer) if isinstance(reading, BlockReading) else min(sides(layer))
    return reading.rule.factored.wide * triplets


def layered(start: ReadOptions, factors: dict[str, float]) -> ReadOptions:
    """`start` with the coefficients of layers multiplied by these; six digits of each are kept."""
    found = dict(start.layers)
    for key, factor in factors.items():
        if factor != 1.0:
            found[key] = float(f"{found.get(key, 1.0) * factor:.6g}")
    return replace(start, layers=tuple(sorted(found.items())))
