"""A rule that looks at single elements, read from triplets: each task vector is made again, a piece at a time, and goes
through the rule as in a fold. What is read is dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from blake3 import blake3

from continual.blocks.factoring import Run
from continual.blocks.shelf import Shelf, Stacked, stacked
from continual.lazily import Tensor, torch
from continual.lazily import numpy as np
from continual.records import TensorSpec
from continual.rules import Accumulators, Inputs, Pass, Rule
from continual.rules.matrices import sides

PIECE = 1 << 24
"""Elements that are made at once of a tensor whose elements can be folded by runs."""
Seed = Callable[[int, str], int]
"""The seed of the random choices in a model's tensor, from the model's number and the layer's name."""


def by_number(number: int, name: str) -> int:
    """A seed from the number and the name alone."""
    return int.from_bytes(blake3(f"{number} {name}".encode()).digest(length=16), "little")


def measure(rule: Rule, shelf: Shelf, number: int, seed: Seed) -> object:
    """What the rule's passes over the whole model `number` find, each tensor made again for each of them; None where
    it needs none."""
    found: object = rule.needs.measure
    numel = sum(spec.numel for spec in shelf.specs.values())
    while isinstance(found, Pass):
        counts = np.zeros(found.bins, np.int64)
        for name in shelf.specs:
            given = stacked(shelf, name, [number])
            if not given.rows:
                continue
            for start, rows, tau in _runs(given, 0, found.share):
                inputs = Inputs(given.spec, seed=seed(number, name), measured=found, start=start)
                found.tally(tau.cpu().reshape(-1), inputs, counts, max(1, round(rows / len(tau))))
        found = found.conclude(counts, numel)
    return found


def dense(rule: Rule, given: Stacked, run: Run, measured: Sequence[object], seeds: Sequence[int]) -> Tensor:
    """X of one layer: float32 of the tensor's shape. `measured` and `seeds` are of the models, in their order."""
    spec, (m, n) = given.spec, sides(given.spec)
    found = torch.zeros(m, n, device=given.u.device)
    step = _step(spec, rule) if given.rows else max(1, m)
    for first in range(0, m if given.rows else 0, step):
        rows = slice(first, min(m, first + step))
        part = spec if step == m else replace(spec, shape=(rows.stop - first, n))
        kept: Accumulators = {
            slot: torch.zeros(one.shape, dtype=getattr(torch, one.dtype), device=found.device)
            for slot, one in rule.slots(part).items()
        }
        for index, where in given.rows.items():
            entrant = run.entrants[index]
            tau = ((given.u[where, rows] * given.sigma[where, None]).mT @ given.v[where]).float().view(part.shape)
            inputs = Inputs(spec, entrant.weight, seeds[index], measured[index], first * n)
            kept = rule.fold.apply(kept, tau, inputs, entrant.before).accumulators
        found[rows] = rule.read.unit(part, kept, run.totals).view(-1, n)
    return found.view(spec.shape)


def _step(spec: TensorSpec, rule: Rule) -> int:
    """How many rows are made at once."""
    m, n = sides(spec)
    return min(m, max(1, PIECE // n)) if rule.fold.elementwise(spec) else m


def _runs(given: Stacked, index: int, share: float) -> Iterator[tuple[int, int, Tensor]]:
    """The task vector of one model by runs of rows: where a run starts, how many rows it has, and these rows, or with a
    `share` below 1 as many of them, spread evenly."""
    m, n = sides(given.spec)
    every = max(1, round(1 / share))
    step = min(m, every * max(1, PIECE // n))
    where = given.rows[index]
    left, right = given.u[where] * given.sigma[where, None], given.v[where]
    for first in range(0, m, step):
        rows = min(step, m - first)
        yield first * n, rows, (left[:, first : first + rows : every].mT @ right).float()
