"""Adapters as factors, in the regimes that are met, and shelves of their blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from continual.blocks import Columns, Layer, triplets
from continual.records import TensorSpec

Factors = tuple[Tensor, Tensor]
Adapter = Mapping[str, Factors]
"""The factors of every layer that an adapter touches: τ = left·rightᵀ."""
Regime = Literal["independent", "shared", "twins", "zero", "mixed", "partial"]
REGIMES: tuple[Regime, ...] = ("independent", "shared", "twins", "zero", "mixed", "partial")

SHAPES: Mapping[str, tuple[int, ...]] = {
    "tall": (40, 24),
    "wide": (24, 44),
    "square": (32, 32),
    "conv": (30, 4, 3, 2),
    "table": (60, 24),
}
MATRICES = {"tall", "wide", "square", "conv"}
SPECS = {
    n: TensorSpec(n, s, "F32", "matrix" if n in MATRICES else "plain", place / 4)
    for place, (n, s) in enumerate(SHAPES.items())
}


class HeldLayers(NamedTuple):
    """A shelf of layers in memory."""

    specs: Mapping[str, TensorSpec]
    layers: Mapping[str, Layer]

    def columns(self, name: str) -> Columns:
        """As the protocol says."""
        return self.layers[name].columns if name in self.layers else Columns.empty(0)

    def vectors(self, name: str, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As the protocol says."""
        layer = self.layers[name]
        return layer.u[list(chosen)], layer.v[list(chosen)]


def sides(name: str) -> tuple[int, int]:
    """Rows and columns of a layer, a convolution as out × rest."""
    rows, *rest = SHAPES[name]
    return rows, int(torch.tensor(rest).prod())


def adapters(regime: Regime, count: int, rank: int = 3, seed: int = 0) -> list[Adapter]:
    """`count` adapters of one regime: with factors of their own; with one first factor A for all; twins; with one that
    is zero; of several ranks; that touch a part of the layers each."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=random)

    shared = {name: normal(sides(name)[1], rank) for name in SHAPES}
    found: list[Adapter] = []
    for number in range(count):
        if regime == "twins" and number % 2:
            found.append(found[-1])
            continue
        adapter = {}
        for place, name in enumerate(SHAPES):
            rows, columns = sides(name)
            r = 1 + (number + place) % (rank + 2) if regime == "mixed" else rank
            left, right = normal(rows, r), shared[name] if regime == "shared" else normal(columns, r)
            if regime == "partial" and (number + place) % 3 == 0:
                continue
            if regime == "zero" and number == 1:
                left = torch.zeros(rows, r)
            adapter[name] = (left, right)
        found.append(adapter)
    return found


def shelf(given: Sequence[Adapter], q: int = 24, specs: Mapping[str, TensorSpec] = SPECS) -> HeldLayers:
    """The adapters folded one after the other, by the numbers 1, 2, …"""
    layers: dict[str, Layer] = {}
    for number, adapter in enumerate(given, 1):
        for name, (left, right) in adapter.items():
            m, n = len(left), len(right)
            layer = layers.get(name) or Layer.empty(m, n, min(q, m, n))
            layers[name] = layer.folded(number, triplets(left, right))
    return HeldLayers(specs, layers)


def dense(held: HeldLayers, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    """The task vectors that the blocks are now, after whatever was cut off, by their numbers."""
    blocks = {name: layer.blocks() for name, layer in held.layers.items()}
    found = []
    for number in numbers:
        model = {}
        for name, spec in held.specs.items():
            block = blocks.get(name, {}).get(number)
            if block is None:
                model[name] = torch.zeros(spec.shape)
            else:
                u, sigma, v = block.u.double(), block.sigma.double(), block.v.double()
                model[name] = ((u * sigma[:, None]).mT @ v).view(spec.shape)
        found.append(model)
    return found
