"""How the loss of a model in memory changes with the weights of the models whose sum it is.

With X = Σ c_i·τ_i the loss changes by ⟨g, τ_i⟩ for each c_i, g its gradient: one backward pass gives all of them. Where
τ_i = UΣVᵀ, ⟨g, τ_i⟩ is the sum of the elements of Σ·(Ug) ∘ V: no task vector is made. How the c_i and the scale follow
from the weights, the reading says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from continual import linalg
from continual.blocks.merged import Merged
from continual.engine.block_reading import BlockReading
from continual.executors.contract import Executor, Task
from continual.lazily import Tensor, torch
from continual.objectives.parameters import Parameters

_STEP = 1e-3
"""Of the logarithm of a weight: coefficients are float32."""


def is_sum(reading: BlockReading) -> bool:
    """Whether what is read is a weighted sum in every tensor that a model touches."""
    factored = reading.rule.factored
    return factored is not None and all(
        factored.linear(spec) for spec in reading.shelf.specs.values() if reading.columns(spec)
    )


class Slopes:
    """Of a reading that is a sum, over the logarithms of factors for groups of models, which are given by their
    numbers."""

    def __init__(self, reading: BlockReading, groups: Sequence[Sequence[int]], executor: Executor) -> None:
        self.merged, self.groups, self._executor = reading.merged, groups, executor
        self._names = [spec.name for spec in reading.shelf.specs.values() if reading.columns(spec)]
        self._needs = {name: reading.need(reading.shelf.specs[name]) for name in self._names}
        self._stacks = {
            layer.name: (spec.name, place)
            for spec in reading.state.format.tensors
            if spec.kind == "stack"
            for place, layer in enumerate(spec.layers)
        }
        self._inner: dict[str, Tensor] = {}  # the ⟨τ_i, τ_j⟩ of each layer, where the length of X has a say

    def at(self, weights: Mapping[int, float], held: Parameters) -> tuple[float, ...]:
        """The slopes where the models have these weights; `held` has the gradient there."""
        tasks = [Task(name, self._needs[name], partial(self._dots, name, held)) for name in self._names]
        dots = dict(self._executor.map(tasks))
        found = []
        for group in self.groups:
            ends = []
            for step in (_STEP, -_STEP):
                moved = {n: w * math.exp(step) if n in group else w for n, w in weights.items()}
                ends.append(self._along(self.merged.weighed(moved), dots))
            found.append((ends[0] - ends[1]) / (2 * _STEP))
        return tuple(found)

    def _along(self, merged: Merged, dots: Mapping[str, Tensor]) -> float:
        """⟨g, X⟩ at the scale of `merged`, with g held."""
        specs = merged.shelf.specs
        by = {name: torch.tensor(merged.run.coefficients_at(specs[name]), dtype=torch.float64) for name in dots}
        if merged.measures:
            merged.settle({name: max(0.0, float(by[name] @ one @ by[name])) for name, one in self._inner.items()})
        for name, each in by.items():
            if (times := merged.times_at(name)) is not None:
                each *= torch.tensor(times, dtype=torch.float64)
        return math.fsum(merged.scale(name) * float(by[name] @ one) for name, one in dots.items())

    def _dots(self, name: str, held: Parameters) -> Tensor:
        """⟨g, τ_i⟩ of every model in one layer, float64."""
        given = self.merged.stacked(name)
        owner = torch.zeros(len(given.sigma), len(self.merged.chosen), dtype=torch.float64)
        for index, where in given.rows.items():
            owner[where, index] = 1.0
        if self.merged.measures and name not in self._inner:
            each = linalg.gram(given.u) * linalg.gram(given.v) * given.sigma[:, None] * given.sigma
            self._inner[name] = owner.mT @ each @ owner
        each_column = torch.zeros_like(given.sigma)
        tensor, place = self._stacks.get(name, (name, 0))
        for one in held[tensor]:
            if (gradient := one.gradient) is not None:
                matrix = gradient.reshape(-1, given.u.shape[1], given.v.shape[1])[place]
                u, v = (side.to(matrix.device, torch.float32) for side in (given.u, given.v))
                each_column += ((u @ matrix) * v).double().sum(1).to(each_column.device)
        return (each_column * given.sigma) @ owner
