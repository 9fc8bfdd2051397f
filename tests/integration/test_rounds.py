"""Relevance rounds on real files: what is scored, what is folded and in which order, and that a kill changes none of
it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual import api
from continual.errors import Misconfigured
from continual.publish.folder import Target
from continual.selection.active import NONE
from continual.selection.frank_wolfe import MergedVector, Search, SearchSpace
from continual.selection.members import Member
from continual.selection.steps import Taken
from continual.state.verify import verify
from tests.helpers import models, quadratic
from tests.helpers.pools import (
    QUERY,
    Stopped,
    adapter,
    bits,
    files,
    fill,
    half,
    loaded,
    names,
    objective,
    opened,
    plainly,
    rows,
    table,
    waits,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


@pytest.mark.parametrize("folded", [False, True])
def test_a_score_is_the_gradient_times_the_task_vector(tmp_path: Path, base: Path, folded: bool) -> None:
    paths = [
        quadratic.good(base, 0),
        quadratic.noise(base, 0),
        models.fine_tune(base, base.parent / "pool/half", 3, size=0.5, change=half),
    ]
    paths.append(adapter(base, "adapter"))
    if folded:
        with opened(tmp_path / "state", base, select="none") as merge:
            assert merge.fold(quadratic.good(base, 1)).fate == "folded"
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *paths)
        model = loaded(merge, by_layer=True)
        reading = merge.reading()
        reading.settle(merge.executor, lambda *_: None)
        model.put(reading.vector, reading.need)
        loss = model.backward()
        members = [Member(w.candidate) for w in merge.pool().values()]
        scores = model.scores(members, lambda *_: None)
        origin = load_file(base / "model.safetensors")
        at = {n: (t.double() + (merge.read(n).double() if folded else 0)).requires_grad_() for n, t in origin.items()}
        value = objective(base)(at)
        gradient = dict(zip(at, torch.autograd.grad(value, list(at.values())), strict=True))
    assert loss == pytest.approx(float(value.detach()), rel=1e-5)
    assert model.count > 1
    assert len({model.layers[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)}) == 2
    for member in members:
        score = scores[member.key]
        assert not isinstance(score, Exception)
        tau = plainly(base, Path(member.candidate.origin))
        expected = {n: float((gradient[n] * t).sum()) for n, t in tau.items()}
        size = math.sqrt(sum(float((gradient[n] * t).square().sum()) for n, t in tau.items()))
        for layer in range(model.count):
            by_hand = math.fsum(v for n, v in expected.items() if model.layers[n] == layer)
            assert score.slopes[layer] == pytest.approx(by_hand, abs=1e-4 * size), (member.name, layer)
        assert score.total == pytest.approx(math.fsum(score.slopes), rel=1e-12)
        assert score.total == pytest.approx(math.fsum(expected.values()), abs=1e-4 * size)
        assert score.tau_sq == pytest.approx(sum(float(t.square().sum()) for t in tau.values()), rel=1e-5)


def test_the_model_in_memory_is_what_an_export_holds_and_a_trial_puts_it_back(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base, "iso-c", select="none") as merge:
        for k in range(2):
            merge.fold(quadratic.good(base, k))
        exported = load_file(merge.export(Target(tmp_path / "out")) / "model.safetensors")
    candidates = quadratic.good(base, 2), adapter(base, "adapter")
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *candidates)
        model, reading = loaded(merge), merge.reading()
        reading.settle(merge.executor, lambda *_: None)
        merged = MergedVector(reading.vector, reading.need, fixed=True)
        members = [Member(w.candidate) for w in merge.pool().values()]
        search = Search(SearchSpace(model, merged, NONE, members), merge.asked(), lambda *_: None)
        start = search.start()
        search.gradient(start)
        held = {n: t.detach().clone() for n, t in model.calibration.model.named_parameters()}
        for name, tensor in exported.items():
            torch.testing.assert_close(held[name], tensor, rtol=0, atol=1e-7, msg=name)
        search.relevant(members[0].key, start)
        for name, tensor in model.calibration.model.named_parameters():
            torch.testing.assert_close(tensor.detach(), held[name], rtol=0, atol=1e-6, msg=name)
        model.move(members[1], 0.5)
        moved = dict(model.calibration.model.named_parameters())[QUERY].detach() - held[QUERY]
        torch.testing.assert_close(moved.double(), 0.5 * plainly(base, candidates[1])[QUERY], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["mean", "iso-c", "opcm"])
def test_the_relevant_ones_are_folded_as_if_by_hand(tmp_path: Path, base: Path, rule: str) -> None:
    good = [quadratic.good(base, k) for k in range(3)]
    noise = [quadratic.noise(base, k) for k in range(4)]
    with opened(tmp_path / "state", base, rule) as merge:
        fill(merge, *noise[:2], *reversed(good), *noise[2:])
        heard: list[Any] = []
        found = merge.round(told=heard.append)
        assert {name for name, row in rows(found).items() if row.fate == "folded"} == {"good0", "good1", "good2"}
        assert {row.fate for name, row in rows(found).items() if name.startswith("noise")} == {"deferred"}
        assert [h.name for h in heard if hasattr(h, "report")] == names(merge)
        assert (found.folds, found.refused) == (3, False)
        assert sorted(waits(merge)) == [f"noise{k}" for k in range(4)]
        assert found.commit is not None
        assert found.commit.entry.kind == "select"
        assert {row.key for row in table(merge)} == {row.key for row in found.rows}
        assert merge.state.ledger.open_round is None
        assert verify(merge.state) == []
        for commit in merge.state.ledger.folds():
            told = commit.entry.numbers.relevance
            row = rows(found)[commit.entry.candidate.name]
            assert (told.score, told.z, told.weight) == (row.score, row.z, row.weight)
        order, ours, totals = names(merge), bits(merge), merge.state.ledger.totals
        assert order == sorted(order, key=lambda name: -(rows(found)[name].weight or 0)), "the heaviest first"
        numbers = {k: c.entry.numbers.cosine for k, c in zip(order, merge.state.ledger.folds(), strict=True)}
    with opened(tmp_path / "plain", base, rule, select="none") as merge:
        for name in order:
            assert merge.fold(base.parent / "pool" / name).fate == "folded"
        assert (bits(merge), merge.state.ledger.totals) == (ours, totals)
        assert numbers == {k: c.entry.numbers.cosine for k, c in zip(order, merge.state.ledger.folds(), strict=True)}


def test_a_chosen_model_is_folded_from_the_files_that_were_compared(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened once: the engine opens none of its own."""
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.good(base, 1))
        monkeypatch.delattr("continual.engine.engine.open_model")
        merge.round()
        assert sorted(names(merge)) == ["good0", "good1"]


def test_what_is_chosen_lowers_the_loss_and_the_figures_say_by_how_much(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(3)), quadratic.noise(base, 0))
        found = merge.round()
        weights = {row.name: row.weight for row in found.rows if row.fate == "folded"}
    origin = load_file(base / "model.safetensors")
    loss = objective(base)
    at = {n: t.double() for n, t in origin.items()}
    assert found.before == pytest.approx(float(loss(at)), rel=1e-5)
    for name, weight in weights.items():
        assert weight is not None
        assert weight > 0
        at = {n: t + weight * plainly(base, base.parent / "pool" / name)[n] for n, t in at.items()}
    assert found.loss == pytest.approx(float(loss(at)), rel=1e-5)
    assert found.loss < 0.5 * found.before
    assert (found.gap or 0.0) >= 0


def test_there_are_two_steps_for_every_member_whatever_the_setting(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base, rounds={"step": "hard", "steps": 1, "tolerance": 0.0, "active": 1}) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(3)))
        heard: list[Any] = []
        found = merge.round(told=heard.append)
        assert max(step.number for step in heard if isinstance(step, Taken)) == 5
        assert found.folds == 3, "as many may have weight as there are"


def test_a_second_round_judges_at_the_new_merge(tmp_path: Path, base: Path) -> None:
    """One that adds nothing to what is in: the first copy of a skill is folded, a later one is not needed."""
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(2)), quadratic.noise(base, 0))
        merge.round()
        assert sorted(names(merge)) == ["good0", "good1"]
        before = bits(merge)
        fill(merge, quadratic.good(base, 2), quadratic.noise(base, 1))
        at = {n: t.double() + merge.read(n).double() for n, t in load_file(base / "model.safetensors").items()}
        second = merge.round()
        assert second.before == pytest.approx(float(objective(base)(at)), rel=1e-5)
        found = rows(second)
        assert found["good2"].fate == "folded"
        assert set(found) == {"good2", "noise0", "noise1"}, "those that are folded are members no more"
        assert (merge.pool()[found["noise0"].key].rounds, merge.pool()[found["noise1"].key].rounds) == (2, 1)
        assert bits(merge) != before


@pytest.mark.parametrize("rule", ["mean", "frank-wolfe"])
def test_a_dry_run_ranks_the_pool_and_changes_nothing(tmp_path: Path, base: Path, rule: str) -> None:
    select = None if rule == "frank-wolfe" else "relevance"
    with opened(tmp_path / "state", base, rule, select=select) as merge:
        fill(merge, quadratic.noise(base, 0), *(quadratic.good(base, k) for k in range(3)), quadratic.noise(base, 1))
    before = files(tmp_path / "state")
    with api.open(
        tmp_path / "state", select=select, objective="tests.helpers.quadratic:make", max_base_ratio=10, device="cpu"
    ) as merge:
        found = merge.look_round()
        again = merge.look_round()
    assert files(tmp_path / "state") == before
    assert found.rows == again.rows
    assert (found.commit, found.folds) == (None, 0)
    assert [row.name for row in found.rows[:2]] == ["good0", "good1"]
    scores = [row.score for row in found.rows if row.score is not None]
    assert len(scores) == 5
    assert scores == sorted(scores)
    relevant = {row.name for row in found.rows if row.reason == "relevant"}
    assert {"good0", "good1", "good2"} <= relevant
    assert {row.fate for row in found.rows} == {"deferred"}
    assert all((row.z is None) == (row.score is not None and row.score >= 0) for row in found.rows)


def test_an_empty_pool_and_a_missing_objective_are_said(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        for run in (merge.round, merge.look_round):
            with pytest.raises(Misconfigured, match="nothing waits in the pool; 'continual fold MODEL'"):
                run()
        assert merge.state.ledger.head.seq == 0
        with pytest.raises(Misconfigured, match="nobody: no candidate"):
            merge.why("nobody")
    with opened(tmp_path / "state", base, objective=None) as merge, pytest.raises(Misconfigured, match="objective"):
        merge.round()
    with (
        opened(tmp_path / "state", base, select="none") as merge,
        pytest.raises(Misconfigured, match="set select = relevance"),
    ):
        merge.round()


# What a kill leaves


def kills(state: Path, base: Path, work: Path, rule: str) -> list[tuple[str, str, Path]]:
    """Runs a round, and keeps what a kill before each step of the commit protocol would leave: the step, the kind of
    record it is for, and the state. What an earlier step left as well is kept once."""
    seen: list[tuple[str, int, Path]] = []
    kept: list[dict[str, bytes]] = []

    def keep(step: str) -> None:
        if (now := files(state)) in kept:
            return
        kept.append(now)
        seen.append((step, merge.state.ledger.head.seq, work / str(len(seen))))
        shutil.copytree(state, seen[-1][2])

    with opened(state, base, rule, on_step=keep) as merge:
        merge.round()
        log = merge.state.ledger.log
    after = ("fsync-commits", "head", "acknowledged")
    return [
        (step, f"{log[head + (step not in after)].entry.kind}-{head + (step not in after)}", left)
        for step, head, left in seen
    ]


@pytest.mark.parametrize("rule", ["mean", "iso-c"])
def test_a_round_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, base: Path, rule: str) -> None:
    state = tmp_path / "state"
    with opened(state, base, rule) as merge:
        fill(
            merge, quadratic.good(base, 0), quadratic.noise(base, 0), quadratic.good(base, 1), quadratic.noise(base, 1)
        )
    left = kills(state, base, tmp_path / "killed", rule)
    with opened(state, base, rule) as merge:
        expected = names(merge), bits(merge), waits(merge)
        members = [(r.name, r.fate, r.score, r.z) for r in table(merge)]
        last = f"fold-{merge.state.ledger.folds()[-1].seq}"
    assert [kind.split("-")[0] for kind in dict.fromkeys(kind for _, kind, _ in left)] == [
        "round",
        "select",
        "fold",
        "fold",
    ]
    assert len(members) == 4
    for step, kind, place in left:
        if rule != "mean" and kind != last:
            continue
        with opened(place, base, rule) as merge:
            assert verify(merge.state) == []
            if names(merge) != expected[0]:
                merge.round()
            assert (names(merge), bits(merge), waits(merge)) == expected, (step, kind)
            first = next(c for c in merge.state.ledger.log if c.entry.kind == "select")
            assert [(r.name, r.fate, r.score, r.z) for r in first.entry.scores] == members, (step, kind)
            assert [c.entry.kind for c in merge.state.ledger.log].count("round") <= 2
            assert merge.state.ledger.open_round is None
            assert verify(merge.state) == []
        shutil.rmtree(place)


def test_a_round_in_which_all_are_chosen_is_taken_up(tmp_path: Path, base: Path) -> None:
    """Nothing would be left in the pool to judge."""
    state = tmp_path / "state"
    with opened(state, base) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.good(base, 1))
    kinds: list[str] = []

    def stop(step: str) -> None:
        kinds.append(step)
        if kinds.count("begin") == 2:
            raise Stopped

    with opened(state, base, on_step=stop) as merge, pytest.raises(Stopped):
        merge.round()
    with opened(state, base) as merge:
        assert (names(merge), waits(merge)) == (["good0"], ["good1"])
        found = merge.round()
        assert (names(merge), waits(merge)) == (["good0", "good1"], [])
        assert found.folds == 1
        assert rows(found)["good1"].fate == "folded"
        with pytest.raises(Misconfigured, match="nothing waits"):
            merge.round()


def test_an_open_round_keeps_its_members_and_another_wish_begins_another(tmp_path: Path, base: Path) -> None:
    state = tmp_path / "state"
    with opened(state, base) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.noise(base, 0))

    def stop(_step: str) -> None:
        if merge.state.ledger.log[-1].entry.kind == "round":
            raise Stopped

    with opened(state, base, on_step=stop) as merge, pytest.raises(Stopped):
        merge.round()
    with opened(state, base) as merge:
        assert merge.state.ledger.open_round is not None
        fill(merge, quadratic.noise(base, 1))
    shutil.copytree(state, tmp_path / "other")
    with opened(state, base) as merge:
        assert set(rows(merge.round())) == {"good0", "noise0"}, "who came later is for the next"
        assert [c.entry.kind for c in merge.state.ledger.log].count("round") == 1
    with opened(tmp_path / "other", base, rounds={"sigmas": 2.0}) as merge:
        assert set(rows(merge.round())) == {"good0", "noise0", "noise1"}
        assert [c.entry.kind for c in merge.state.ledger.log].count("round") == 2


def test_a_round_takes_no_more_disk_than_is_to_be_kept(tmp_path: Path, base: Path) -> None:
    most: list[int] = []

    def count(_step: str) -> None:
        most.append(len(list((tmp_path / "state/generations").iterdir())))

    with opened(tmp_path / "state", base, keep=1, on_step=count) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(3)))
        merge.round()
        assert len(names(merge)) == 3
    assert max(most) <= 2, "the one that is kept, and the one that is written"


# What becomes of a candidate
