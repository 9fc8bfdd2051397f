"""A state is built again from its ledger and its models: equal bit for bit, whatever happened to it; and where it
cannot be, that is said before anything is built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, linalg, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.replay import Replayed
from continual.replay.comparing_states import other_software
from continual.state import State
from continual.state.entries import SelectEntry
from continual.state.software import software
from continual.state.verify import verify
from tests.helpers import adapters, models, pools, quadratic, weighed
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow

SHAPES = {n: s for n, s in models.SHAPES.items() if ".layers.1." not in n}
OFF = ["noise.act=off", "norms.act=off", "copies.act=off"]


def opened(state: Path, **settings: Any) -> api.Merge:
    return api.Merge(
        Settings(**{"state": state, "gates": OFF, "max_base_ratio": 100.0, "keep": 2, **settings}), write=True
    )


def made(tmp_path: Path, recipe: making.Recipe) -> tuple[Path, Callable[[str, int], Path]]:
    """A new state, and what makes models for it: fine-tunes, or adapters."""
    base = models.base(tmp_path / "base", shapes=SHAPES)
    making.init(base, tmp_path / "state", recipe)

    def model(name: str, seed: int) -> Path:
        if recipe.width is not None:
            return adapters.lora(tmp_path / name, base, seed, modules=("q_proj", "down_proj"))
        return models.ship(models.fine_tune(base, tmp_path / name, seed), seed)

    return tmp_path / "state", model


def a_life(tmp_path: Path, recipe: making.Recipe) -> Path:
    """Folds with weights, a tag, a rollback over two folds, an unfold, a model that comes back, another scale."""
    state, model = made(tmp_path, recipe)
    weights = {"b": 0.5} if making.rule(recipe.rule_name, recipe.options).laws.weighted else {}
    with opened(state, weights=weights) as merge:
        for number, name in enumerate("abc"):
            outcome = merge.fold(model(name, number))
            assert outcome.fate == "folded", outcome.message
        merge.state.tag("three")
        for number, name in enumerate("xy", 3):
            merge.fold(model(name, number))
        merge.state.rollback(3)
        merge.fold(model("d", 5))
        merge.unfold(merge.look_unfold("a"))
        merge.fold(model("e", 6))
        merge.rescale("0.7")
        merge.retry("a")
        assert merge.fold(tmp_path / "a").fate == "folded"
    return state


def names(state: Path) -> list[str]:
    with api.open(state) as merge:
        return [fold.entry.candidate.name for fold in merge.state.ledger.folds()]


RECIPES = {
    "mean": making.Recipe("mean"),
    "opcm": making.Recipe("opcm"),
    "tsv-m": making.Recipe("tsv-m"),
    "ties": making.Recipe("ties"),
    "fisher": making.Recipe("fisher"),
    "drop before": making.Recipe("task-arithmetic", {"before": ["drop"]}),
    "adapters": making.Recipe("iso-c", width=8),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_life_is_lived_again(tmp_path: Path, recipe: making.Recipe) -> None:
    state = a_life(tmp_path, recipe)
    with api.Merge(Settings(state=state)) as merge:
        found = merge.replay(tmp_path / "again")
    assert (found.equal, found.differs, found.software) == (True, (), ())
    assert found.compared >= 2, "the newest and the tagged one"
    assert found.records == 9, "a, b, c, their tag, d, the unfold, e, the scale, a again"
    assert names(tmp_path / "again") == names(state) == ["b", "c", "d", "e", "a"]
    assert found.left_out == ("folds that a rollback undid: records 5, 6",)
    with State.open(tmp_path / "again") as again, State.open(state) as before:
        assert verify(again) == []
        assert again.id != before.id
        assert again.ledger.tags.keys() == {"three"}
        assert again.ledger.totals == before.ledger.totals


def test_adapters_that_whole_tensors_took_in(tmp_path: Path) -> None:
    """Beside a whole fine-tune; the first is taken out, under a rule that folds the later ones again."""
    state, model = made(tmp_path, RECIPES["opcm"])
    with opened(state) as merge:
        for number, name in enumerate(("lora-1", "lora-2")):
            assert merge.fold(adapters.lora(tmp_path / name, tmp_path / "base", number)).fate == "folded"
        assert merge.fold(model("whole", 1)).fate == "folded"
        merge.unfold(merge.look_unfold("lora-1"))
        assert merge.replay(tmp_path / "again").equal


def test_moved_models_and_those_that_are_others_now(tmp_path: Path) -> None:
    state = a_life(tmp_path, RECIPES["mean"])
    (tmp_path / "moved").mkdir()
    for name in "abcde":
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with api.Merge(Settings(state=state)) as merge:
        with pytest.raises(Misconfigured, match=r"5 of 5 models cannot be folded again: a \(record"):
            merge.replay(tmp_path / "again")
        assert not (tmp_path / "again").exists(), "nothing is built"
        look = merge.look_replay([tmp_path / "moved"])
        assert ([one.why for one in look.models], look.folds) == ([""] * 5, 6)
        assert merge.replay(tmp_path / "again", [tmp_path / "moved"]).equal
        tensors = load_file(tmp_path / "moved" / "c" / "model.safetensors")
        tensors["model.norm.weight"][0] += 1e-4
        save_file(tensors, tmp_path / "moved" / "c" / "model.safetensors")
        with pytest.raises(Misconfigured, match=r"1 of 5 .* c \(record 3\): .*/moved/c holds other tensors"):
            merge.replay(tmp_path / "other", [tmp_path / "moved"])
        assert not (tmp_path / "other").exists()
        with pytest.raises(Misconfigured, match="no such directory"):
            merge.look_replay([tmp_path / "none"])


def test_what_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after folds by other software, which rounds otherwise."""
    add = linalg.add

    def other(total: torch.Tensor, term: torch.Tensor, weight: float) -> linalg.Added:
        found = add(total, term, weight)
        if total.numel() == 16:
            total.view(-1)[3] += 1e-6
        return found

    state, model = made(tmp_path, RECIPES["mean"])
    with opened(state) as merge, monkeypatch.context() as patched:
        patched.setattr(linalg, "add", other)
        merge.fold(model("a", 1))
        merge.fold(model("b", 2))
    with api.Merge(Settings(state=state)) as merge:
        found = merge.replay(tmp_path / "again")
        commit = replace(merge.state.ledger.get(1))
        newer = replace(commit.entry, device="cpu")
        older = replace(newer, software={**software(), "torch": "1.0"}, device="cuda:0")
    assert not found.equal
    short = [name for name, shape in SHAPES.items() if shape == (16,)]
    assert {one for one in found.differs if "tensor" in one} >= {f"record 2: tensor {name}" for name in short}
    assert not any("proj" in one for one in found.differs)
    (said,) = other_software([replace(commit, entry=older), replace(commit, entry=newer)], "cpu")
    assert said.startswith("1 record (1): torch 1.0, here ")
    assert said.endswith("; device cuda:0, here cpu")
    done = run("replay", tmp_path / "again", "--state", state)
    assert (done.returncode, "NOT equal" in done.stdout) == (4, True)
    assert f"differs: record 2: tensor {short[0]}" in done.stderr


def test_a_kill_is_gone_on_from(tmp_path: Path) -> None:
    state = a_life(tmp_path, RECIPES["opcm"])
    settings = Settings(state=state)

    class Killed(Exception):
        pass

    for steps in range(1, 9, 3):

        def killed(stage: str, done: int, _: int, steps: int = steps) -> None:
            if (stage, done) == ("replay", steps):
                raise Killed

        with api.Merge(settings) as merge, pytest.raises(Killed):
            merge.replay(tmp_path / "again", progress=killed)
    seen = []
    with api.Merge(settings) as merge:
        found = merge.replay(tmp_path / "again", progress=lambda stage, done, _: seen.append((stage, done)))
        assert found.equal
        assert ("replay", 6) not in seen, "what is there is not made again"
        assert merge.replay(tmp_path / "again").equal, "nothing is left to be made"
    with opened(tmp_path / "again") as other:
        other.fold(models.ship(models.fine_tune(tmp_path / "base", tmp_path / "z", 9), 9))
    with api.Merge(settings) as merge, pytest.raises(Misconfigured, match="is no part of this ledger"):
        merge.replay(tmp_path / "again")


@pytest.mark.parametrize("kind", ["mean", "adapters"])
def test_states_that_were_combined_are_built_again_with_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of which had another combined into it; a brought model is taken out, and the other state goes on."""
    state, model = made(tmp_path, RECIPES[kind])
    for number, name in enumerate(("second", "third")):
        making.init(tmp_path / "base", tmp_path / name, RECIPES[kind])
        with opened(tmp_path / name, weights={"b1": 0.5} if kind == "mean" else {}) as other:
            other.fold(model(f"a{number}", 10 + number))
            other.fold(model(f"b{number}", 20 + number))
            other.unfold(other.look_unfold(f"a{number}"))
            other.fold(model(f"c{number}", 30 + number))
    with opened(tmp_path / "second") as second:
        second.combine(tmp_path / "third")
        second.fold(model("d", 40))
    with opened(state) as merge:
        merge.fold(model("e", 50))
        merge.combine(tmp_path / "second")
        merge.unfold(merge.look_unfold("b1"))
        merge.fold(model("f", 60))
    with opened(tmp_path / "third", keep=1) as third:
        third.fold(model("g", 70))
    others = [tmp_path / "third", tmp_path / "second"]
    with api.Merge(Settings(state=state)) as merge:
        assert merge.look_replay(states=others).records == 4 + 6 + 4
        found = merge.replay(tmp_path / "again", states=others)
        assert (found.equal, found.differs, found.records) == (True, (), 14)
        assert merge.replay(tmp_path / "again", states=others).equal, "nothing is left to be made"
    assert names(tmp_path / "again") == names(state)
    with State.open(tmp_path / "again") as again:
        assert verify(again) == []
    (tmp_path / "here").mkdir()
    with monkeypatch.context() as patch, api.Merge(Settings(state=state)) as merge:
        patch.chdir(tmp_path / "here")
        assert merge.replay(".", states=others).equal
    assert {one.name for one in tmp_path.glob("here*")} == {"here", "here-2", "here-2-5"}
    done = run("replay", tmp_path / "by command", "--state", state, "--with", others[0])
    assert (done.returncode, "record 2 brought" in done.stderr) == (2, True), done.stderr
    body = machine("replay", tmp_path / "by command", "--state", state, "--with", others[0], "--with", others[1])
    assert (body["equal"], body["tensors"]) == (True, found.tensors)


def test_what_cannot_be_built_again_is_refused_in_words(tmp_path: Path) -> None:
    state, model = made(tmp_path, RECIPES["mean"])
    making.init(tmp_path / "base", tmp_path / "second", RECIPES["mean"])
    shutil.copytree(tmp_path / "second", tmp_path / "forked")
    with opened(tmp_path / "second") as second:
        second.fold(model("b", 2))
    with opened(state) as merge:
        merge.fold(model("a", 1))
        merge.combine(tmp_path / "second")
        with pytest.raises(Misconfigured, match="record 2 brought the models of another state"):
            merge.replay(tmp_path / "again")
        with pytest.raises(Misconfigured, match="are one state, or copies of one"):
            merge.replay(tmp_path / "again", states=[tmp_path / "second", tmp_path / "second"])
        with State.open(tmp_path / "second", write=True) as second:
            second.rollback(0)
        assert merge.replay(tmp_path / "again", states=[tmp_path / "second"]).equal, "it has gone on"
        shutil.rmtree(tmp_path / "again")
        with pytest.raises(Misconfigured, match="has records up to 0, and record 2 brought its models of record 1"):
            merge.replay(tmp_path / "again", states=[tmp_path / "forked"])
        with opened(tmp_path / "forked") as forked:
            forked.fold(model("another", 3))
        with pytest.raises(Misconfigured, match="it is not that state, but has its id"):
            merge.replay(tmp_path / "again", states=[tmp_path / "forked"])
        assert not (tmp_path / "again").exists()
        merge.state.rollback(1)
        assert merge.replay(tmp_path / "again").equal, "it is on no line to what is in force"
    making.init(tmp_path / "base", tmp_path / "third", RECIPES["ties"])
    with api.open(tmp_path / "third") as merge, pytest.raises(Misconfigured, match="another base, rule or form"):
        merge.replay(tmp_path / "again")


def test_the_command(tmp_path: Path) -> None:
    state = a_life(tmp_path, RECIPES["tsv-m"])
    look = machine("replay", tmp_path / "again", "--dry-run", "--state", state)
    assert ({row["why"] for row in look["models"]}, look["folds"]) == ({None}, 6)
    assert not (tmp_path / "again").exists()
    done = run("replay", tmp_path / "again", "--state", state)
    assert done.returncode == 0, done.stderr
    assert "EQUAL: 7 tensors of the newest merge, bit for bit" in done.stdout
    assert "not built again: folds that a rollback undid" in done.stdout
    body = machine("replay", tmp_path / "again", "--state", state)
    assert set(body) == set(Replayed.__dataclass_fields__)
    shutil.rmtree(tmp_path / "b")
    done = run("replay", tmp_path / "other", "--dry-run", "--state", state)
    assert (done.returncode, "1 of them cannot be used" in done.stdout) == (1, True)
    done = run("replay", tmp_path / "other", "--state", state)
    assert (done.returncode, "1 of 5 models cannot be folded again: b" in done.stderr) == (2, True)


@pytest.mark.parametrize("by_layer", [False, True])
def test_rounds_that_weigh_are_made_again_from_their_records(tmp_path: Path, by_layer: bool) -> None:
    """Two rounds, of which the second weighs all anew, a model taken out, a rollback; no row is asked."""
    base = quadratic.world(tmp_path)
    with weighed.opened(tmp_path / "state", base, rounds={"rho": 1.0, "layers": by_layer}) as merge:
        pools.fill(merge, quadratic.good(base, 0, "partly", share=0.6), quadratic.good(base, 1))
        merge.round()
        pools.fill(merge, quadratic.good(base, 0, "better", seed=3), quadratic.noise(base, 0))
        merge.round()
        merge.unfold(merge.look_unfold("good1"))
        assert merge.replay(tmp_path / "again").equal
        merge.state.rollback(merge.state.ledger.head.seq - 1)
    with api.Merge(Settings(state=tmp_path / "state")) as merge:
        found = merge.replay(tmp_path / "other")
        assert (found.equal, found.records) == (True, 2)
        assert found.compared >= 1


def test_rounds_that_let_models_in_are_folds(tmp_path: Path) -> None:
    base = quadratic.world(tmp_path)
    with pools.opened(tmp_path / "state", base) as merge:
        pools.fill(merge, quadratic.good(base, 0), quadratic.good(base, 1), quadratic.noise(base, 0))
        merge.round()
        found = merge.replay(tmp_path / "again")
        assert (found.equal, found.records) == (True, 2)


def test_rounds_that_weigh_adapters_are_refused_in_words(tmp_path: Path) -> None:
    state, _ = made(tmp_path, making.Recipe("frank-wolfe", width=8))
    with api.open(state, write=True) as merge:
        zeros = {"loss": 0.0, "before": 0.0, "gap": 0.0, "pool_gap": 0.0}
        merge.record(SelectEntry(of=0, objective="x", steps=0, scores=(), active={}, **zeros))
        with pytest.raises(Misconfigured, match="record 1 is of a round that weighed the adapters"):
            merge.replay(tmp_path / "again")
