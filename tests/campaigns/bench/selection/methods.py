"""What is done with a pool, by any of the methods that are compared: the merged weights, which models are in them, and
what it took."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import continual
from continual.executors.contract import silent
from continual.making import Recipe
from continual.selection.active import active_at
from continual.state.fields import body_of
from tests.campaigns.bench.quality.suite import Form
from tests.campaigns.bench.selection.world import World


class Merged(NamedTuple):
    """Float32 `weights`; by name the share of the weight that each model in the merge has; CPU seconds; figures of the
    round, if one was run."""

    weights: Mapping[str, Tensor]
    shares: Mapping[str, float]
    seconds: float
    round: Mapping[str, Any]


Method = Callable[[World, int, Path], Merged]


def _read(merge: continual.Merge) -> dict[str, Tensor]:
    reading = merge.reading()
    reading.settle(merge.executor, silent)
    specs = [spec for spec in merge.base.specs if spec.kind != "carried"]
    return {spec.name: reading.vector(spec).add_(merge.base.checkpoint.read(spec.name)) for spec in specs}


def plain(rule: str, scale: str, world: World, irrelevant: int, state: Path) -> Merged:
    """Every model of the pool, by a rule that has no data."""
    return fold(rule, scale, [path for _, path in world.members(irrelevant)], world, state)


def random(method: Method, world: World, irrelevant: int, state: Path) -> Merged:
    """A method over the pool whose models learned nothing."""
    other = copy.copy(world)
    other.members = world.random  # type: ignore[method-assign]
    return method(other, irrelevant, state)


def fold(rule: str, scale: str, paths: Sequence[Path], world: World, state: Path) -> Merged:
    """These models, folded by a rule."""
    began = time.process_time()
    shutil.rmtree(state, ignore_errors=True)
    continual.init(world.suite.prepare(), state, Recipe(rule=rule, scale=scale))
    with continual.open(state, write=True, workers=1, keep=1, device="cpu") as merge:
        for path in paths:
            assert merge.fold(path).fate == "folded"
        names = [fold.entry.candidate.name for fold in merge.state.ledger.folds()]
        return Merged(_read(merge), {name: 1 / len(names) for name in names}, time.process_time() - began, {})


def rounds(rule: str, options: Mapping[str, Any], world: World, irrelevant: int, state: Path) -> Merged:
    """A round over the pool: relevance before `rule`, or Frank-Wolfe where that is the rule."""
    began = time.process_time()
    shutil.rmtree(state, ignore_errors=True)
    continual.init(world.suite.prepare(), state, Recipe(rule=rule))
    settings = world.settings()
    settings["rounds"] = settings.get("rounds", {}) | options
    select = {} if rule == "frank-wolfe" else {"select": "relevance"}
    with continual.open(state, write=True, workers=1, keep=1, device="cpu", **select, **settings) as merge:
        for _, path in world.members(irrelevant):
            assert merge.fold(path).fate == "deferred"
        found = merge.round()
        names = {fold.entry.candidate.key: fold.entry.candidate.name for fold in merge.state.ledger.folds()}
        weights = {key: sum(w) for key, w in active_at(merge.state).weights.items()} or dict.fromkeys(names, 1.0)
        total = sum(weights.values()) or 1.0
        shares = {names[key]: weight / total for key, weight in weights.items()}
        told = {"loss": found.loss, "before": found.before, "gap": found.gap, "pool_gap": found.pool_gap}
        told |= {"steps": found.steps, "members": [body_of(row) for row in found.rows]}
        return Merged(_read(merge), shares, time.process_time() - began, told)


def learn(form: Form, world: World, irrelevant: int, state: Path) -> Merged:  # noqa: ARG001 - no model is asked
    """No merge: the base fine-tuned on the calibration rows."""
    began = time.process_time()
    weights = world.learn(form)
    return Merged(weights, {}, time.process_time() - began, {})


METHODS: Mapping[str, Method] = {
    "average": partial(plain, "mean", "paper"),
    "task arithmetic": partial(plain, "task-arithmetic", "paper"),
    "ties": partial(plain, "ties", "paper"),
    "opcm": partial(plain, "opcm", "paper"),
    "iso-c": partial(plain, "iso-c", "auto"),
    "gram": partial(plain, "gram", "auto"),
    "tsv-m": partial(plain, "tsv-m", "auto"),
    "tsv-flow": partial(plain, "tsv-flow", "auto"),
    "relevance + iso-c": partial(rounds, "iso-c", {}),
    "relevance + gram": partial(rounds, "gram", {}),
    "relevance + tsv-m": partial(rounds, "tsv-m", {}),
    "relevance + tsv-flow": partial(rounds, "tsv-flow", {}),
    "frank-wolfe corrective, by layer": partial(rounds, "frank-wolfe", {"step": "corrective"}),
    "frank-wolfe corrective": partial(rounds, "frank-wolfe", {"step": "corrective", "layers": False}),
    "frank-wolfe pairwise": partial(rounds, "frank-wolfe", {"step": "pairwise"}),
    "frank-wolfe soft": partial(rounds, "frank-wolfe", {"step": "soft"}),
    "frank-wolfe hard": partial(rounds, "frank-wolfe", {"step": "hard"}),
    "iso-c, random models": partial(random, partial(plain, "iso-c", "auto")),
    "relevance + iso-c, random models": partial(random, partial(rounds, "iso-c", {})),
    "frank-wolfe corrective, by layer, random models": partial(
        random, partial(rounds, "frank-wolfe", {"step": "corrective"})
    ),
    "fine-tuning on the rows": partial(learn, "full"),
    "LoRA on the rows": partial(learn, "lora"),
}
"""By the name in the table. `iso-c`, `gram`, `tsv-m` and `tsv-flow` are read as continual reads them by default, the
others of the data-free ones as their papers do."""
WITHOUT = ("fine-tuning on the rows", "LoRA on the rows")
"""Methods that no pool changes."""
