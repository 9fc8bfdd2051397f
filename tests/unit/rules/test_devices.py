"""Every rule computes on the device of its tensors: none of its steps leaves one on the CPU, or mixes the two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from continual.records import Totals
from continual.rules import RULES, Inputs, Sums, rule, settle
from tests.helpers import batch
from tests.helpers.elsewhere import DEVICES, Reachable, lies_on
from tests.helpers.streams import MATRICES, SHAPES, SPECS, Model, bound, distance, measure

Kept = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _reachable() -> Iterator[None]:
    with Reachable():
        yield


def models(count: int) -> list[Model]:
    random = torch.Generator().manual_seed(3)
    return [{n: 0.01 * torch.randn(shape, generator=random) for n, shape in SHAPES.items()} for _ in range(count)]


def merged(name: str, given: list[Model], device: torch.device) -> tuple[Model, Kept]:
    """What the rule reads of these models at scale 1, and what it keeps, all of it on the device."""
    one, totals = rule(name), Totals()
    kept = {
        n: {slot: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)).to(device) for slot, s in one.slots(spec).items()}
        for n, spec in SPECS.items()
    }
    for model in given:
        measured, sums = measure(one, model), []
        for n, tau in model.items():
            moments = batch.moments_of(tau).to(device) if one.needs.shipped else None
            inputs = Inputs(SPECS[n], 1.0, batch.seed_of(n, tau), measured, moments=moments)
            folded = one.fold.apply(kept[n], tau.clone().to(device), inputs, totals)
            kept[n] = dict(folded.accumulators)
            sums.append(folded.sums)
        totals = settle(totals, Sums.total(sums), 1.0)
    return {n: one.read.unit(spec, kept[n], totals) for n, spec in SPECS.items()}, kept


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_folds_and_reads_where_its_tensors_are(name: str, device: torch.device) -> None:
    given = models(3)
    here, _ = merged(name, given, torch.device("cpu"))
    there, kept = merged(name, given, device)
    for tensor, found in there.items():
        assert lies_on(found, device), tensor
        assert all(lies_on(value, device) for value in kept[tensor].values()), tensor
        folded = [model[tensor] for model in given]
        assert distance(found.cpu(), here[tensor], folded) < bound(name, folded if tensor in MATRICES else ()), tensor
