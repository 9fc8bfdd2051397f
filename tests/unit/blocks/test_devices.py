"""Blocks are made, read and explained on the device of their factors: nothing is left on the CPU, or mixes the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pytest
import torch

from continual.blocks import Columns, Explaining, Merged, decomposed, triplets
from continual.records import TensorSpec
from continual.rules import RULES, read_options, rule
from tests.helpers.elsewhere import DEVICES, Reachable, lies_on
from tests.helpers.shelves import SPECS, HeldLayers, adapters, shelf
from tests.helpers.streams import distance


@pytest.fixture(autouse=True)
def _reachable() -> Iterator[None]:
    with Reachable():
        yield


class There(NamedTuple):
    """A shelf whose vectors lie on the device."""

    held: HeldLayers
    device: torch.device

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.held.specs

    def columns(self, name: str) -> Columns:
        return self.held.columns(name)

    def vectors(self, name: str, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        u, v = self.held.vectors(name, chosen)
        return u.to(self.device), v.to(self.device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_triplets_are_made_where_the_factors_are(device: torch.device) -> None:
    for left, right in adapters("mixed", 1)[0].values():
        found = triplets(left.to(device), right.to(device))
        assert all(lies_on(part, device) for part in (found.u, found.sigma, found.v))
        assert distance((found.u * found.sigma[:, None]).cpu().mT @ found.v.cpu(), left @ right.mT) < 1e-6


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_matrix_is_decomposed_where_it_is(device: torch.device) -> None:
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    found = decomposed(matrix.to(device), 8)
    assert all(lies_on(part, device) for part in (found.u, found.sigma, found.v))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", [name for name in RULES if name != "fisher"])
def test_a_reading_of_blocks_is_made_where_they_are(name: str, device: torch.device) -> None:
    some = {layer: SPECS[layer] for layer in ("tall", "table")}
    held = shelf([{layer: given[layer] for layer in some} for given in adapters("mixed", 2, rank=2)], specs=some)
    chosen = dict.fromkeys((1, 2), 1.0)
    here, there = (Merged(one, chosen, rule(name), read_options(name)) for one in (held, There(held, device)))
    assert here.settle() == pytest.approx(there.settle(), rel=1e-4)
    for tensor in held.specs:
        expected, found = here.dense(tensor), there.dense(tensor)
        assert lies_on(found, device)
        assert distance(found.cpu(), expected) < 1e-3, tensor
        if there.factored:
            assert lies_on(there.thin(tensor, 2).left, device)
    shares = Explaining(there).shares().whole
    for number, share in Explaining(here).shares().whole.items():
        assert shares[number] == pytest.approx(share, abs=1e-3), number
