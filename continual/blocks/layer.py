"""The blocks of one layer in memory: the small arrays and the singular vectors, column by column."""

from __future__ import annotations

from typing import NamedTuple

from continual.blocks.columns import Arrangement, Columns, plan, without
from continual.blocks.triplets import Block
from continual.lazily import Tensor, torch


class Layer(NamedTuple):
    """The blocks of one m×n layer: `columns`, and for each of the q columns a row of `u` (q×m) and `v` (q×n), float32,
    zeros where the column is free."""

    columns: Columns
    u: Tensor
    v: Tensor

    @staticmethod
    def empty(m: int, n: int, q: int) -> Layer:
        """A layer of q free columns."""
        return Layer(Columns.empty(q), torch.zeros(q, m), torch.zeros(q, n))

    def blocks(self) -> dict[int, Block]:
        """What each model is here, by its number."""
        return {number: self.block(number) for number in self.columns.models}

    def block(self, number: int) -> Block:
        """What the model `number` is here. Raises KeyError for one that has no columns."""
        where = self.columns.models[number]
        return Block(
            self.u[where],
            torch.from_numpy(self.columns.sigma[where]).to(self.u.device),
            self.v[where],
            float(self.columns.energy[where.start]),
            int(self.columns.rank[where.start]),
        )

    def folded(self, number: int, block: Block) -> Layer:
        """The layer with the model `number` besides."""
        return self._arranged(plan(self.columns, number, block), number, block)

    def without(self, number: int) -> Layer:
        """The layer without the model `number`."""
        return self._arranged(without(self.columns, number), 0, None)

    def _arranged(self, found: Arrangement, number: int, block: Block | None) -> Layer:
        def rows(old: Tensor, new: Tensor | None) -> Tensor:
            after = torch.zeros_like(old)
            after[: len(found.keep)] = old[list(found.keep)]
            if new is not None:
                after[len(found.keep) : found.used] = new[: found.take]
            return after

        u, v = (block.u, block.v) if block is not None else (None, None)
        return Layer(found.columns(self.columns, number, block), rows(self.u, u), rows(self.v, v))
