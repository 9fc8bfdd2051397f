"""The commands that are ended at every step: what each begins with, what it does, and what a second one may answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from continual import api, making, tuning
from continual.config import Settings
from continual.hub import Hub
from continual.publish import folder
from continual.publish.folder import Target
from continual.publish.lora import LoraTarget
from continual.service import release as releasing
from tests.helpers import adapters, models, quadratic
from tests.helpers.released import REPO
from tests.loopback import TOKEN

SHAPES = {"model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (5, 4)}
RULES = ("iso-c", "opcm")
ADAPTERS = "adapters"
"""In place of a rule: a state that keeps adapters as they are, with room for two of the four."""
ALL = (*RULES, ADAPTERS)


@dataclass(frozen=True)
class World:
    """Where a command runs: `models` has the base and its fine-tunes and never changes; `work` has the state `state`
    and what is written beside it, and is copied for each run; `hub` is where a Hub answers, if the command needs
    one."""

    models: Path
    work: Path
    rule: str
    hub: str | None = None

    @property
    def base(self) -> Path:
        return self.models / "base"

    @property
    def state(self) -> Path:
        return self.work / "state"

    @property
    def recipe(self) -> making.Recipe:
        return making.Recipe(width=4) if self.rule == ADAPTERS else making.Recipe(rule=self.rule)

    def model(self, number: int | str) -> Path:
        """A fine-tune that such a state can keep: a full one, or an adapter; `bad` is one that is refused."""
        return self.models / (f"lora-{number}" if self.rule == ADAPTERS else f"ft-{number}")

    def opened(self, **settings: Any) -> api.Merge:
        """The state, open for writing."""
        asked = {"state": self.state, "workers": 1, "device": "cpu", "keep": 50, "max_base_ratio": 10.0}
        client = None if self.hub is None else Hub(endpoint=self.hub, token=TOKEN)
        return api.Merge(Settings(**{**asked, **settings}), write=True, client=client)

    def at(self, work: Path) -> World:
        """The same in another directory."""
        return World(self.models, work, self.rule, self.hub)


@dataclass(frozen=True)
class Step:
    """A command. `begin` makes what it begins with, in `work`; `run` is the command on an open merge, `settings` how
    that is opened; None where the command makes the state itself. `records` is how many it makes. `again` is what a
    second one says in whose way the first one stands. `only` names the rules that can do it; `outside` what it writes
    beside the state; `hub` is whether it needs a Hub."""

    name: str
    begin: Callable[[World], None]
    run: Callable[[World, api.Merge | None], object]
    records: int = 1
    settings: tuple[tuple[str, object], ...] = ()
    again: str | None = None
    only: tuple[str, ...] = ALL
    outside: str | None = None
    hub: bool = False
    further: Callable[[api.Merge], object] | None = None
    """What a second one goes on to, where the first was killed late: that is a right end as well."""


def make_models(place: Path) -> Path:
    """The base and the fine-tunes of all commands."""
    base = quadratic.world(place, SHAPES)
    for number in range(1, 5):
        models.fine_tune(base, place / f"ft-{number}", number)
        adapters.lora(place / f"lora-{number}", base, number, rank=2, modules=("up_proj", "lm_head"))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")

    models.fine_tune(base, place / "ft-bad", 9, change=spoil)
    spoiled = {"base_model.model.lm_head.lora_A.weight": torch.full((2, 4), torch.nan)}
    spoiled |= {"base_model.model.lm_head.lora_B.weight": torch.ones(5, 2)}
    adapters.plain(place / "lora-bad", spoiled, target_modules=["lm_head"])
    quadratic.good(base, 0)
    quadratic.good(base, 1)
    quadratic.noise(base, 0)
    return base


def nothing(world: World) -> None:
    """No state yet."""
    (world.work / "out").mkdir()


def of_folds(count: int) -> Callable[[World], None]:
    """A state of so many folds."""

    def begin(world: World) -> None:
        nothing(world)
        making.init(world.base, world.state, world.recipe)
        with world.opened() as merge:
            for number in range(1, 1 + count):
                assert merge.fold(world.model(number)).fate == "folded"

    return begin


def tagged(world: World) -> None:
    of_folds(2)(world)
    with world.opened() as merge:
        merge.state.tag("v1", 1)


def beside_another(world: World) -> None:
    """A state of one fold, and another of two in `other`."""
    for count, name in ((2, "other"), (1, "state")):
        of_folds(count)(world.at(world.work))
        if name == "other":
            world.state.rename(world.work / "other")
            shutil.rmtree(world.work / "out")
    with world.opened() as merge:
        merge.unfold(merge.look_unfold(world.model(1).name))
        merge.fold(world.model(3))


def published(world: World) -> None:
    of_folds(1)(world)
    with world.opened() as merge:
        keep_current(world, merge)
        merge.fold(world.model(2))


def waiting(world: World) -> None:
    """A state with a pool of three."""
    of_folds(0)(world)
    with world.opened(**dict(ROUNDS)) as merge:
        for name in ("good0", "noise0", "good1"):
            assert merge.fold(world.models / "pool" / name).fate == "deferred"


def keep_current(world: World, merge: api.Merge) -> Path:
    """As the daemon does after a fold."""
    seq = merge.head
    return folder.keep_current(world.work / "out/current", seq, lambda d: merge.export(Target(d, at=seq)))


def folding(number: int) -> Callable[[World, api.Merge | None], object]:
    return lambda world, merge: opened(merge).fold(world.model(number))


def opened(merge: api.Merge | None) -> api.Merge:
    assert merge is not None
    return merge


def tuned(world: World, merge: api.Merge | None) -> object:
    command = tuning.Command(("/bin/sh", "-c", "echo 1", "{model}"))
    wanted = tuning.Tuning(candidates=3, work=world.work / "out", policy="number", around=0.5)
    return opened(merge).tune(command, wanted)


def unfolded(world: World, merge: api.Merge | None) -> object:
    return opened(merge).unfold(opened(merge).look_unfold(world.model(1).name))


def released(_world: World, merge: api.Merge | None) -> object:
    """As the command does it."""
    return opened(merge).state.record(releasing.entry(releasing.release(opened(merge))))


def rounded(_world: World, merge: api.Merge | None) -> object:
    """A round, or the rest of one; nothing where one has ended and nothing of it is left to do."""
    ledger = opened(merge).state.ledger
    ended = any(commit.entry.kind == "select" for commit in ledger.log)
    left = [w for w in ledger.pool.values() if w.last is not None and w.last.fate == "chosen"]
    return None if ended and ledger.open_round is None and not left else opened(merge).round()


def refused(world: World, merge: api.Merge | None) -> object:
    outcome = opened(merge).fold(world.model("bad"))
    assert outcome.fate in ("refused", "known"), outcome
    return outcome


ROUNDS: tuple[tuple[str, object], ...] = (("select", "relevance"), ("objective", "tests.helpers.quadratic:make"))

STEPS = (
    Step(
        "init",
        nothing,
        lambda w, _merge: making.init(w.base, w.state, w.recipe),
        again="already is a state",
    ),
    Step("fold", of_folds(1), folding(2)),
    Step("fold and expire", of_folds(2), folding(3), settings=(("keep", 1),)),
    Step("refuse", of_folds(1), refused),
    Step("tag", of_folds(2), lambda _w, merge: opened(merge).state.tag("v1", 1)),
    Step("tag --force", tagged, lambda _w, merge: opened(merge).state.tag("v1", 2, force=True)),
    Step("rollback", of_folds(2), lambda _w, merge: opened(merge).state.rollback(1)),
    Step("unfold", of_folds(3), unfolded, again="no model of this name"),
    Step(
        "combine",
        beside_another,
        lambda w, merge: opened(merge).combine(w.work / "other"),
        again="in both states",
        only=("iso-c", ADAPTERS),
    ),
    Step("scale", of_folds(1), lambda _w, merge: opened(merge).rescale("0.5")),
    Step("tune", of_folds(1), tuned, outside="out"),
    Step(
        "export",
        of_folds(1),
        lambda w, merge: opened(merge).export(w.work / "out/merged"),
        records=0,
        again="exists",
        outside="out",
    ),
    Step(
        "export --as-lora",
        of_folds(1),
        lambda w, merge: opened(merge).export_lora(LoraTarget(w.work / "out/lora", 2)),
        records=0,
        again="exists",
        outside="out",
    ),
    Step("current", published, lambda w, merge: keep_current(w, opened(merge)), records=0, outside="out"),
    Step("release", of_folds(1), released, settings=(("release", {"repo": REPO}),), hub=True),
    Step("pool round", waiting, rounded, records=-1, settings=ROUNDS, only=RULES, further=api.Merge.round),
)
