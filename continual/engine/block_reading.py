"""The merged task vector of a state of adapters: made when it is read, from the chosen models' singular triplets."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

from continual.blocks import Columns
from continual.blocks.factoring import ThinProduct
from continual.blocks.merged import Merged
from continual.engine.models_inputs import ModelsInputs
from continual.engine.reading import Reading, Seen, digest_of
from continual.engine.views import ReadView
from continual.executors.contract import Executor, Progress, Task
from continual.executors.device import pick_device, turn
from continual.lazily import torch
from continual.records import TensorSpec
from continual.rules import ModelTerms, ReadOptions, Rule, Size, check_terms, terms_of
from continual.rules.sums import everything
from continual.state import State
from continual.state.format import Commit, FoldCommit
from continual.tensors.vectors.thin import sides_of

_ROUNDED = 1e-6
"""What rounding may take of a model's ‖τ‖², relative; beyond that something was cut."""


class CutModel(NamedTuple):
    """A model of which a state keeps a part, by its name and the record of its fold; `cut`: the share of its ‖τ‖² that
    was cut off to make room, in layers that are full."""

    name: str
    seq: int
    cut: float


class StoredLayers:
    """The layers of a record's generation, read when they are asked for (`continual.blocks.Shelf`). Thread-safe. The
    small arrays are kept."""

    def __init__(self, state: State, commit: Commit) -> None:
        self._generation = state.generation_of(commit)
        self._width = state.format.form.width if state.format.form else 0
        self._columns: dict[str, Columns] = {}
        self._specs = {layer.name: layer for layer in state.format.layers}
        self._here = threading.local()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within it this thread is given vectors on `device`."""
        self._here.device = device
        try:
            yield
        finally:
            del self._here.device

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor that an adapter can change; of a stack each expert."""
        return self._specs

    def columns(self, name: str) -> Columns:
        """The small arrays of a layer. Raises Damaged and Misconfigured."""
        if name not in self._columns:
            if self._generation is None or not self._generation.has(name):
                return Columns.empty(self._width)
            self._columns[name] = Columns.of(self._generation.read(name, "columns"))
        return self._columns[name]

    def cut(self, folds: Sequence[FoldCommit]) -> dict[int, float]:
        """The share of ‖τ‖² that was cut off by now of each of these models, by its number; 0 where nothing was. Raises
        Damaged and Misconfigured."""
        kept: dict[int, float] = {}
        for name in self._specs:
            columns = self.columns(name)
            for number, where in columns.models.items():
                square = float((columns.sigma[where].astype(float) ** 2).sum())
                kept[number] = kept.get(number, 0.0) + square
        found = {}
        for fold in folds:
            number, square = fold.entry.numbers.block or 0, fold.entry.numbers.tau_norm**2
            lost = 1.0 - kept.get(number, 0.0) / square if square else 0.0
            found[number] = lost if lost > _ROUNDED else 0.0
        return found

    def vectors(self, name: str, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of `u` and of `v` of the chosen columns. Raises Damaged and Misconfigured."""
        assert self._generation is not None, "columns were chosen"
        begin, end = min(chosen), max(chosen) + 1
        places = [column - begin for column in chosen]
        all_rows = places == list(range(end - begin))
        device = getattr(self._here, "device", "cpu")
        u, v = (self._generation.read_rows(name, slot, begin, end) for slot in ("u", "v"))
        return (
            (torch.from_numpy(u).to(device), torch.from_numpy(v).to(device))
            if all_rows
            else (torch.from_numpy(u[places]).to(device), torch.from_numpy(v[places]).to(device))
        )


class BlockReading(Reading):
    """A state of adapters as it is read by a view."""

    kept_by_elements = False

    def __init__(
        self,
        state: State,
        rule: Rule,
        seq: int | None = None,
        view: ReadView | None = None,
        options: ReadOptions | None = None,
    ) -> None:
        """Raises Misconfigured for a view that the state cannot be read by."""
        super().__init__(state, rule, seq, options)
        self.view = view or ReadView()
        self.rule, self.options = self.view.read_by(rule, self.options, state)
        self.shelf = StoredLayers(state, self.commit)
        given = dict(self.options.weights)
        self.chosen = self.view.chosen(state, self.commit.seq, given)
        self.layered = self.view.layered(state, self.commit.seq, given) if self.rule.laws.rounds else {}
        folds = state.ledger.folds(at=self.commit.seq) if self.rule.needs.inputs else []
        mine = [fold for fold in folds if fold.entry.numbers.block in self.chosen]
        self.inputs = ModelsInputs(state, self.rule, mine) if self.rule.needs.inputs else None
        if self.options.terms:
            check_terms(self.rule, blocks=True)

    @cached_property
    def merged(self) -> Merged:
        """What the chosen models read as."""
        found = Merged(self.shelf, self.chosen, self.rule, self.options).by_layer(self.layered).by_term(self._times)
        if self.inputs is not None:
            found = found.by_inputs(self.inputs.layer)
        self.totals = found.totals
        return found

    @cached_property
    def keys(self) -> dict[int, str]:
        """As of every reading."""
        folds = self.state.ledger.folds(at=self.commit.seq)
        found = {fold.entry.numbers.block: fold.entry.candidate.key for fold in folds}
        return {number: found[number] for number in self.chosen}

    def has_terms(self, spec: TensorSpec) -> bool:
        """As of every reading: here of whatever an adapter can change."""
        return terms_of(self.rule, blocks=True) and spec.kind != "carried"

    def terms(self, spec: TensorSpec) -> Iterator[ModelTerms]:
        """As of every reading."""
        for layer in spec.layers:
            if layer.name in self.shelf.specs:
                yield self.merged.terms(layer.name)

    def settle(self, executor: Executor, progress: Progress) -> float:
        """As of every reading."""
        if self.settled_factors is None:
            if self.merged.measures and not self.merged.settled and self.chosen:
                self.measure(executor, progress)
            elif self.merged.measures and not self.merged.settled:
                self.merged.settle({})
            self.settled_factors = self.merged.factors
        return self.settled_factors[0]

    def factor(self) -> float | None:
        """As of every reading."""
        if self.settled_factors is not None:
            return self.settled_factors[0]
        return None if self.merged.measures else self.merged.factors[0]

    @property
    def contents(self) -> str:
        """Which models are read, in which order, with which weights, how many triplets each has in each tensor, and by
        whose inputs."""
        folds = self.state.ledger.folds(at=self.commit.seq)
        digests = {fold.entry.numbers.block: fold.entry.digest for fold in folds}
        kept = {
            name: [where.stop - where.start for number, where in models.items() if number in self.chosen]
            for name in self.shelf.specs
            if (models := self.shelf.columns(name).models).keys() & self.chosen.keys()
        }
        layered = {number: list(each.values()) for number, each in self.layered.items()}
        models_read = [[digests[number], layered.get(number, weight)] for number, weight in self.chosen.items()]
        what: list[object] = [models_read, kept]
        if self.inputs is not None:
            what.append([self.inputs.contents[number] for number in self.chosen])
        return digest_of(what, self.rule, replace(self.options, weights=()))

    def cut(self) -> tuple[CutModel, ...]:
        """The models that are read and of which something was cut off, in the order of their folds. Raises Damaged."""
        folds = self.state.ledger.folds(at=self.commit.seq)
        lost = self.shelf.cut(folds)
        return tuple(
            CutModel(fold.entry.candidate.name, fold.seq, share)
            for fold in folds
            if (number := fold.entry.numbers.block) in self.chosen and (share := lost[number])
        )

    def size(self) -> Size:
        """How long X is, as far as that is known without a pass."""
        return self.merged.size

    def unit(self, spec: TensorSpec) -> torch.Tensor:
        """X of one tensor, at scale 1."""
        return self._made(spec, self.merged.unit)

    def vector(self, spec: TensorSpec) -> torch.Tensor:
        """The merged task vector of one tensor: float32 of the tensor's shape, in new memory."""
        return self._made(spec, self.merged.dense)

    def _made(self, spec: TensorSpec, make: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """What is made of one layer, or of those of a stack one after the other."""
        if spec.kind != "stack":
            if spec.name not in self.shelf.specs:
                return torch.zeros(spec.shape)
            with self._turn(spec):
                return make(spec.name).view(spec.shape).cpu()
        found = torch.zeros(spec.experts, *spec.expert.shape)
        for place, layer in zip(found, spec.layers, strict=True):
            if self.columns(layer):
                with self._turn(layer):
                    place.copy_(make(layer.name))
        return found.view(spec.shape)

    @contextmanager
    def _turn(self, spec: TensorSpec) -> Iterator[None]:
        """Within it what is read of a layer is computed where the settings say. Inputs of layers are on the CPU."""
        device = pick_device("cpu" if self.inputs is not None else self.device)
        with turn(device, self.need(spec)) as here, self.shelf.on(here):
            yield

    def made_from(self, spec: TensorSpec) -> object:
        """As of every reading. Where the rule goes by all totals, or by the order of the models, by all that is
        read."""
        generation, by = self.state.generation_of(self.commit), self.rule.read.goes_by
        if generation is None or not self.columns(spec):
            return None
        some = by is not None and self.rule.laws.order_free and self.inputs is None
        found: list[object] = [self.state.id, self.rule.name, dict(self.rule.options), None if some else self.contents]
        found.append((by if some and by is not None else everything)(spec, self.totals))
        for layer in spec.layers:
            models = self.shelf.columns(layer.name).models
            mine = [(n, w, list(self.layered.get(n, {}).items())) for n, w in self.chosen.items() if n in models]
            marks = generation.marks(layer.name, self.state.format.slots[layer.name]) if models else None
            times = sorted(self.times_at(layer.name).items())
            found.append([mine, self.merged.scale(layer.name).hex(), marks, times])
        return found

    def thin(self, spec: TensorSpec, rank: int | None = None) -> ThinProduct:
        """The merged task vector of one tensor as two thin factors, of the largest `rank` singular values where one is
        given. Only where the rule is `factored`; `settle` comes first."""
        return self.merged.thin(spec.name, rank)

    @property
    def factored(self) -> bool:
        """Whether what is read are thin factors; else it is dense."""
        return self.merged.factored

    def columns(self, spec: TensorSpec) -> int:
        """How many singular triplets the chosen models have in a tensor: no reading of it has a higher rank. Of a stack
        the most of its experts."""
        if spec.kind == "stack":
            return max((self.columns(layer) for layer in spec.layers), default=0)
        if spec.name not in self.shelf.specs:
            return 0
        models = self.shelf.columns(spec.name).models
        return sum(where.stop - where.start for number, where in models.items() if number in self.chosen)

    def need(self, spec: TensorSpec) -> int:
        """Bytes that reading one tensor takes at its peak."""
        m, n = sides_of(spec.expert.shape if spec.kind == "stack" else spec.shape)
        known = 0 if self.inputs is None else 8 * 3 * max(m, n) * self.inputs.rank
        return 4 * spec.numel + 8 * 4 * self.columns(spec) * (m + n) + known

    def measure(self, executor: Executor, progress: Progress, seen: Seen | None = None) -> float:
        """‖X‖ over the whole model; `seen` is given X of each tensor."""
        tensors = [spec for spec in self.state.format.tensors if spec.kind != "carried"]
        specs = [spec for spec in tensors if seen is not None or self.columns(spec)]
        squares: dict[str, float] = {}
        progress("measure", 0, len(specs))
        tasks = [
            Task(
                spec.name,
                self.need(spec) - (4 * spec.numel if seen is None and self.factored else 0),
                partial(self._squares_of, spec, seen),
            )
            for spec in specs
        ]
        for done, (_, found) in enumerate(executor.map(tasks), 1):
            squares |= found
            progress("measure", done, len(specs))
        self.merged.settle(squares)
        return math.sqrt(math.fsum(squares.values()))

    def _squares_of(self, spec: TensorSpec, seen: Seen | None) -> dict[str, float]:
        if seen is not None:
            seen(spec, self.unit(spec))
        found = {}
        for layer in spec.layers:
            with self._turn(layer):
                found[layer.name] = self.merged.square(layer.name)
        return found


def cut_since(state: State, before: Mapping[int, float]) -> dict[str, float]:
    """What was cut off of the models in force since `before`, the shares of ‖τ‖² that `StoredLayers.cut` said then: of
    those that lost some, by name. A model that was not there has lost all that it lacks. Raises Damaged."""
    folds = state.ledger.folds()
    now = StoredLayers(state, state.ledger.head).cut(folds)
    lost = {fold.entry.candidate.name: now[n] - before.get(n, 0.0) for fold in folds if (n := fold.entry.numbers.block)}
    return {name: share for name, share in lost.items() if share > _ROUNDED}
