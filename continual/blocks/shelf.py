"""Where the blocks of a model come from, and which of its models are read with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from continual.blocks.columns import Columns
from continual.blocks.triplets import Block
from continual.lazily import Tensor, torch
from continual.records import TensorSpec
from continual.rules import LayerInputs


class Shelf(Protocol):
    """The layers of a model as blocks, by the names under which they are kept.

    `specs`: every tensor that can be folded, also those that no model has touched; of a stack each expert by a name of
    its own, with the spec of one expert.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def columns(self, name: str) -> Columns:
        """The small arrays of a layer; without columns where no model has touched it."""
        ...

    def vectors(self, name: str, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rows of `u` and of `v` that belong to the chosen columns, float32, in new memory or not."""
        ...


class Stacked(NamedTuple):
    """The chosen models' triplets in one layer, one model's below the other's: `u` (K×m), `sigma` (K) and `v` (K×n) in
    float64. `rows`: where those of each model are, by its index among the chosen; a model that did not touch the layer
    is not there. `inputs`: those that the layer has on rows of each model's task, by the same index, where the rule
    reads by them and they are known of all. `times`: what the term of each model in X is multiplied by, by the same
    index, where there are such coefficients."""

    spec: TensorSpec
    u: Tensor
    sigma: Tensor
    v: Tensor
    rows: Mapping[int, slice]
    inputs: Sequence[LayerInputs] | None = None
    times: Sequence[float] | None = None

    def block(self, index: int) -> Block:
        """The block of one model, float32, as it is kept."""
        where = self.rows[index]
        u, sigma, v = (part[where].float() for part in (self.u, self.sigma, self.v))
        return Block(u, sigma, v, float(self.sigma[where].square().sum()), len(sigma))

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """One model's task vector as m×k and n×k, float64; k is 0 where it did not touch the layer."""
        where = self.rows.get(index, slice(0, 0))
        return (self.u[where] * self.sigma[where, None]).mT, self.v[where].mT

    def without(self, index: int) -> Stacked:
        """The same without one of the chosen models; those after it come one earlier. The vectors are shared."""
        rows = {place - (place > index): where for place, where in self.rows.items() if place != index}
        inputs = self.inputs and [one for place, one in enumerate(self.inputs) if place != index]
        times = self.times and [one for place, one in enumerate(self.times) if place != index]
        return self._replace(rows=rows, inputs=inputs, times=times)


def stacked(shelf: Shelf, name: str, chosen: Sequence[int], *, exact: bool = True) -> Stacked:
    """The triplets of the models with these numbers, in this order. Without `exact` the vectors stay float32."""
    columns = shelf.columns(name)
    models, spec, rows, wanted = columns.models, shelf.specs[name], {}, list[int]()
    for index, number in enumerate(chosen):
        if number in models:
            mine = range(models[number].start, models[number].stop)
            rows[index] = slice(len(wanted), len(wanted) + len(mine))
            wanted.extend(mine)
    if not wanted:
        empty = torch.zeros(0, dtype=torch.float64)
        return Stacked(spec, empty[:, None], empty, empty[:, None], {})
    u, v = shelf.vectors(name, wanted)
    sigma = torch.from_numpy(columns.sigma[wanted]).to(u.device)
    if exact:
        u, v = u.double(), v.double()
    return Stacked(spec, u, sigma.double(), v, rows)
