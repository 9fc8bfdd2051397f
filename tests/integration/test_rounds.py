"""Relevance rounds on real files: what is scored, what is folded and in which order, what becomes of the others, and that a kill changes none of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from continual import api
from continual.config import Settings
from continual.errors import Misconfigured, Retry
from continual.publish.folder import Target
from continual.rounds import Round
from continual.rounds.active import NONE
from continual.rounds.fates import Row
from continual.rounds.frank_wolfe import Origin, Search
from continual.rounds.loaded import Loaded
from continual.rounds.members import member_of
from continual.selection import calibration
from tests import models, quadratic

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


def opened(state: Path, base: Path, rule: str = "mean", *, on_step: Callable[[str], None] | None = None, **settings: Any) -> api.Merge:
    if not state.exists():
        api.init(base, state, api.Asked(rule=rule))
    asked = {"select": "relevance", "objective": "tests.quadratic:make", "max_base_ratio": 10.0, "device": "cpu", "state": state}
    return api.Merge(Settings(**{**asked, **settings}), write=True, on_step=on_step)


def fill(merge: api.Merge, *candidates: Path) -> None:
    for path in candidates:
        assert merge.fold(path).fate == "deferred"


def rows(found: Round) -> dict[str, Row]:
    assert len({row.key for row in found.rows}) == len(found.rows), "a member has two rows"
    return {row.name: row for row in found.rows}


def table(merge: api.Merge) -> list[Mapping[str, Any]]:
    """The last round's table, as the record has it."""
    commit = next(c for c in reversed(merge.state.log) if c.entry.kind == "select")
    found: list[Mapping[str, Any]] = (commit.entry.numbers or {})["scores"]
    return found


def names(merge: api.Merge) -> list[str]:
    return [(c.entry.candidate or {})["name"] for c in merge.state.folds()]


def waits(merge: api.Merge) -> list[str]:
    return [(w.commit.entry.candidate or {})["name"] for w in merge.pool().values()]


def bits(merge: api.Merge) -> dict[tuple[str, str], bytes]:
    slots = merge.state.format.slots
    return {(n, s): merge.state.read(n, s).tobytes() for n in slots for s in slots[n]}


def files(state: Path) -> dict[str, bytes]:
    return {str(p.relative_to(state)): p.read_bytes() for p in state.rglob("*") if p.is_file() and p.name != "lock"}


def adapter(base: Path, name: str) -> Path:
    """A LoRA adapter of two projections, in PEFT's layout."""
    place = base.parent / "pool" / name
    place.mkdir()
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for layer, inner in ((0, "self_attn.q_proj"), (1, "mlp.up_proj")):
        out, width = models.SHAPES[f"model.layers.{layer}.{inner}.weight"]
        module = f"base_model.model.model.layers.{layer}.{inner}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, width, generator=random) * 0.1
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2, generator=random) * 0.1
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def half(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.bfloat16)


def plainly(base: Path, path: Path) -> dict[str, Tensor]:
    """A task vector in float64, by what the formats say."""
    origin = load_file(base / "model.safetensors")
    if (path / "adapter_model.safetensors").exists():
        found = {}
        factors = load_file(path / "adapter_model.safetensors")
        for name in (n for n in factors if n.endswith("lora_A.weight")):
            product = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
            found[name.removeprefix("base_model.model.").replace("lora_A.", "")] = 3.0 * product
        return found
    tuned = load_file(path / "model.safetensors")
    return {n: t.double() - origin[n].to(t.dtype).double() for n, t in tuned.items()}


def objective(base: Path, seed: int = 0) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss on the driving rows as a function of the parameters, in the dtype of these."""
    loaded = calibration.load(calibration.Wanted("tests.quadratic:make", seed=seed), base, torch.device("cpu"))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        theta = quadratic.flat(parameters)
        parts = []
        for dealt in loaded.dealt:
            task: Any = dealt.task
            signs, wanted = task.signs[dealt.drive].to(theta.dtype), task.wanted[dealt.drive].to(theta.dtype)
            parts.append((0.5 * (signs @ theta - wanted).square()).mean())
        return torch.stack(parts).mean()

    return loss


def loaded(merge: api.Merge, *, by_layer: bool = False) -> Loaded:
    return Loaded(
        merge.engine, calibration.load(merge.asked().calibration, merge.base.checkpoint.path, torch.device("cpu")), by_layer=by_layer
    )


@pytest.mark.parametrize("folded", [False, True])
def test_a_score_is_the_gradient_times_the_task_vector(tmp_path: Path, base: Path, folded: bool) -> None:
    paths = [quadratic.good(base, 0), quadratic.noise(base, 0), models.fine_tune(base, base.parent / "pool/half", 3, size=0.5, change=half)]
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
        members = [member_of(w.commit.entry.candidate or {}) for w in merge.pool().values()]
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
        tau = plainly(base, member.path)
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
        origin = Origin(reading.vector, reading.need, fixed=True)
        members = [member_of(w.commit.entry.candidate or {}) for w in merge.pool().values()]
        search = Search(merge.engine, model, origin, NONE, members, merge.asked(), lambda *_: None)
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
        assert {row["key"] for row in table(merge)} == {row.key for row in found.rows}
        assert merge.state.open_round is None
        assert merge.state.verify() == []
        for commit in merge.state.folds():
            told = (commit.entry.numbers or {})["relevance"]
            row = rows(found)[(commit.entry.candidate or {})["name"]]
            assert (told["score"], told["z"], told["weight"]) == (row.score, row.z, row.weight)
        order, ours, totals = names(merge), bits(merge), dict(merge.state.totals)
        assert order == sorted(order, key=lambda name: -(rows(found)[name].weight or 0)), "the heaviest first"
        numbers = {k: (c.entry.numbers or {})["cosine"] for k, c in zip(order, merge.state.folds(), strict=True)}
    with opened(tmp_path / "plain", base, rule, select="none") as merge:
        for name in order:
            assert merge.fold(base.parent / "pool" / name).fate == "folded"
        assert (bits(merge), dict(merge.state.totals)) == (ours, totals)
        assert numbers == {k: (c.entry.numbers or {})["cosine"] for k, c in zip(order, merge.state.folds(), strict=True)}


def test_what_is_chosen_lowers_the_loss_and_the_figures_say_by_how_much(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(3)), quadratic.noise(base, 0))
        found = merge.round()
        weights = {row.name: row.weight for row in found.rows if row.fate == "folded"}
    origin = load_file(base / "model.safetensors")
    loss = objective(base)
    at = {n: t.double() for n, t in origin.items()}
    assert found.numbers["before"] == pytest.approx(float(loss(at)), rel=1e-5)
    for name, weight in weights.items():
        assert weight is not None
        assert weight > 0
        at = {n: t + weight * plainly(base, base.parent / "pool" / name)[n] for n, t in at.items()}
    assert found.numbers["loss"] == pytest.approx(float(loss(at)), rel=1e-5)
    assert found.numbers["loss"] < 0.5 * found.numbers["before"]
    assert found.numbers["gap"] >= 0


def test_a_second_round_judges_at_the_new_merge(tmp_path: Path, base: Path) -> None:
    """One that adds nothing to what is in: the first copy of a skill is folded, a later one is not needed."""
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(2)), quadratic.noise(base, 0))
        merge.round()
        assert sorted(names(merge)) == ["good0", "good1"]
        before = bits(merge)
        fill(merge, quadratic.good(base, 2), quadratic.noise(base, 1))
        found = rows(merge.round())
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
    with api.open(tmp_path / "state", select=select, objective="tests.quadratic:make", max_base_ratio=10, device="cpu") as merge:
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
        assert merge.state.head.seq == 0
        with pytest.raises(Misconfigured, match="nobody: no candidate"):
            merge.why("nobody")
    with opened(tmp_path / "state", base, objective=None) as merge, pytest.raises(Misconfigured, match="objective"):
        merge.round()
    with opened(tmp_path / "state", base, select="none") as merge, pytest.raises(Misconfigured, match="set select = relevance"):
        merge.round()


# What a kill leaves


class Stopped(Exception):
    """Raised in the middle, as a kill would."""


def kills(state: Path, base: Path, work: Path, rule: str) -> list[tuple[str, str, Path]]:
    """Runs a round, and keeps what a kill before each step of the commit protocol would leave: the step, the kind of record it is for, and the state."""
    seen: list[tuple[str, int, Path]] = []

    def keep(step: str) -> None:
        seen.append((step, merge.state.head.seq, work / str(len(seen))))
        shutil.copytree(state, seen[-1][2])

    with opened(state, base, rule, on_step=keep) as merge:
        merge.round()
        log = merge.state.log
    after = ("fsync-commits", "head", "acknowledged")
    return [(step, f"{log[head + (step not in after)].entry.kind}-{head + (step not in after)}", left) for step, head, left in seen]


@pytest.mark.parametrize("rule", ["mean", "iso-c"])
def test_a_round_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, base: Path, rule: str) -> None:
    state = tmp_path / "state"
    with opened(state, base, rule) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.noise(base, 0), quadratic.good(base, 1), quadratic.noise(base, 1))
    left = kills(state, base, tmp_path / "killed", rule)
    with opened(state, base, rule) as merge:
        expected = names(merge), bits(merge), waits(merge)
        members = [(r["name"], r["fate"], r["score"], r["z"]) for r in table(merge)]
        last = f"fold-{merge.state.folds()[-1].seq}"
    assert [kind.split("-")[0] for kind in dict.fromkeys(kind for _, kind, _ in left)] == ["round", "select", "fold", "fold"]
    assert len(members) == 4
    for step, kind, place in left:
        if rule != "mean" and kind != last:
            continue
        with opened(place, base, rule) as merge:
            assert merge.state.verify() == []
            if names(merge) != expected[0]:
                merge.round()
            assert (names(merge), bits(merge), waits(merge)) == expected, (step, kind)
            first = next(c for c in merge.state.log if c.entry.kind == "select")
            assert [(r["name"], r["fate"], r["score"], r["z"]) for r in (first.entry.numbers or {})["scores"]] == members, (step, kind)
            assert [c.entry.kind for c in merge.state.log].count("round") <= 2
            assert merge.state.open_round is None
            assert merge.state.verify() == []
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
        if merge.state.log[-1].entry.kind == "round":
            raise Stopped

    with opened(state, base, on_step=stop) as merge, pytest.raises(Stopped):
        merge.round()
    with opened(state, base) as merge:
        assert merge.state.open_round is not None
        fill(merge, quadratic.noise(base, 1))
    shutil.copytree(state, tmp_path / "other")
    with opened(state, base) as merge:
        assert set(rows(merge.round())) == {"good0", "noise0"}, "who came later is for the next"
        assert [c.entry.kind for c in merge.state.log].count("round") == 1
    with opened(tmp_path / "other", base, rounds={"sigmas": 2.0}) as merge:
        assert set(rows(merge.round())) == {"good0", "noise0", "noise1"}
        assert [c.entry.kind for c in merge.state.log].count("round") == 2


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


def test_patience_then_refused_and_looked_at_again_on_retry(tmp_path: Path, base: Path) -> None:
    noise = quadratic.noise(base, 0)
    with opened(tmp_path / "state", base, rounds={"patience": 2}) as merge:
        fill(merge, quadratic.good(base, 0), noise)
        assert rows(merge.round())["noise0"].fate == "deferred"
        assert merge.fold(noise).reason == "waiting"
        found = merge.round()
        assert (rows(found)["noise0"].fate, rows(found)["noise0"].reason, found.refused) == ("refused", "irrelevant", True)
        assert merge.pool() == {}
        told = merge.fold(noise)
        assert (told.fate, told.refused, "irrelevant in 2 rounds" in told.message) == ("known", True, True)
        why = merge.why("noise0")
        assert (why.fate, why.reason, [r["fate"] for r in why.rounds]) == ("refused", "irrelevant", ["deferred", "refused"])
        assert len(merge.retry("noise0")) == 1
        assert merge.why("noise0").fate == "open"
        assert merge.fold(noise).fate == "deferred"
        assert merge.pool()[why.key].rounds == 0
        with pytest.raises(Misconfigured, match="noise0"):
            merge.retry("noise0")


def test_what_is_gone_expires_and_new_files_are_a_new_candidate(tmp_path: Path, base: Path) -> None:
    deleted, changed = quadratic.noise(base, 0), quadratic.noise(base, 1)
    with opened(tmp_path / "state", base) as merge:
        fill(merge, deleted, changed, quadratic.good(base, 0))
        old = merge.why("noise1").key
        shutil.rmtree(deleted)
        shutil.rmtree(changed)
        quadratic.good(base, 1, "noise1")
        found = rows(merge.round())
        assert [(found[n].fate, found[n].reason) for n in ("noise0", "noise1")] == [("expired", "gone")] * 2
        assert "is not there any more" in found["noise0"].message
        assert "not those that were seen" in found["noise1"].message
        assert (found["good0"].fate, merge.pool()) == ("folded", {})
        fill(merge, changed)
        assert merge.why("noise1").key != old
        assert rows(merge.round())["noise1"].fate == "folded"
        settled = merge.state.fate(old)
        assert settled is not None
        assert settled.entry.fate == "expired"


def test_a_folder_that_cannot_be_reached_settles_nothing(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.noise(base, 0))
        (base.parent / "pool").rename(base.parent / "away")
        with pytest.raises(Retry, match=r"cannot be reached; nothing was settled"):
            merge.round()
        assert sorted(waits(merge)) == ["good0", "noise0"]
        assert merge.state.open_round is not None
        (base.parent / "away").rename(base.parent / "pool")
        assert rows(merge.round())["good0"].fate == "folded"
        assert [c.entry.kind for c in merge.state.log].count("round") == 1


@pytest.mark.parametrize("stage", ["score", "trial", "line search", "gradient"])
@pytest.mark.parametrize("rule", ["mean", "frank-wolfe"])
def test_a_member_that_vanishes_in_the_middle_is_tried_again_without_it(tmp_path: Path, base: Path, stage: str, rule: str) -> None:
    good = [quadratic.good(base, k) for k in range(2)]
    select = None if rule == "frank-wolfe" else "relevance"

    def vanish(at: str, _done: int, _total: int) -> None:
        if at == stage and good[1].exists():
            shutil.rmtree(good[1])

    with opened(tmp_path / "state", base, rule, select=select) as merge:
        fill(merge, *good, quadratic.noise(base, 0))
        try:
            found = merge.round(vanish)
        except Retry:
            found = merge.round()
        assert rows(found)["good0"].fate == "folded"
        assert (rows(found)["good1"].fate, rows(found)["good1"].reason) == ("expired", "gone")
        assert names(merge) == ["good0"]
        assert merge.state.verify() == []


@pytest.mark.parametrize("change", ["deleted", "other"])
def test_what_was_chosen_and_changed_since_is_not_folded(tmp_path: Path, base: Path, change: str) -> None:
    good = [quadratic.good(base, k) for k in range(2)]
    state = tmp_path / "state"
    with opened(state, base) as merge:
        fill(merge, *good)

    def stop(step: str) -> None:
        if step == "begin":
            raise Stopped

    with opened(state, base, on_step=stop) as merge, pytest.raises(Stopped):
        merge.round()
    shutil.rmtree(good[0])
    if change == "other":
        quadratic.noise(base, 0, "good0")
    with opened(state, base) as merge:
        key = merge.why("good0").key
        merge.round()
        assert names(merge) == ["good1"]
        assert key not in merge.pool()
        assert merge.why("good0").reason == "gone"
        if change == "other":
            assert merge.fold(good[0]).fate == "deferred", "what is there now is another candidate"


def test_the_old_expire_by_age_and_the_oldest_of_too_many(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base, rounds={"age": 1e-3}) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.noise(base, 0))
        found = rows(merge.round())
        assert (found["good0"].fate, found["noise0"].fate, found["noise0"].reason) == ("folded", "expired", "age")
        told = merge.fold(base.parent / "pool/noise0")
        assert (told.fate, told.commit.entry.fate) == ("known", "expired")
        assert merge.retry("noise0")
    with opened(tmp_path / "crowd", base, rounds={"most": 2}) as merge:
        fill(merge, quadratic.noise(base, 3), quadratic.noise(base, 1), quadratic.good(base, 1), quadratic.noise(base, 2))
        found = rows(merge.round())
        assert {n: r.fate for n, r in found.items()} == {"noise3": "expired", "noise1": "deferred", "noise2": "deferred", "good1": "folded"}
        assert (found["noise3"].reason, waits(merge)) == ("count", ["noise1", "noise2"])


def test_numbers_that_are_none_are_refused_by_tensor(tmp_path: Path, base: Path) -> None:
    def bad(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY][2, 3] = math.nan

    broken = models.fine_tune(base, base.parent / "pool/broken", 1, change=bad)
    far = models.fine_tune(base, base.parent / "pool/far", 1, size=400.0)
    with opened(tmp_path / "state", base) as merge:
        fill(merge, broken, far, quadratic.good(base, 0))
        found = rows(merge.round())
        assert (found["broken"].fate, found["far"].fate, found["good0"].fate) == ("refused", "refused", "folded")
        assert QUERY in found["broken"].message
        assert "max_base_ratio" in found["far"].message
        assert merge.pool() == {}
        assert merge.fold(broken).refused
        assert QUERY in merge.why("broken").message


def test_two_names_for_one_model_are_folded_once(tmp_path: Path, base: Path) -> None:
    good = quadratic.good(base, 0)
    twin = base.parent / "pool/twin"
    shutil.copytree(good, twin)
    with opened(tmp_path / "state", base) as merge:
        fill(merge, good, twin, quadratic.good(base, 1))
        found = rows(merge.round())
        merged = bits(merge)
        folded = [n for n, row in found.items() if row.fate == "folded"]
        assert "good1" in folded
        assert len({"good0", "twin"} & set(folded)) == 1
        order = names(merge)
    other = "twin" if "good0" in folded else "good0"
    if found[other].fate == "refused":
        assert found[other].reason == "duplicate"
    with opened(tmp_path / "plain", base, select="none") as merge:
        for name in order:
            merge.fold(base.parent / "pool" / name)
        assert bits(merge) == merged


def test_what_is_folded_already_does_not_wait_again(tmp_path: Path, base: Path) -> None:
    good = quadratic.good(base, 0)
    copy = base.parent / "pool/copy"
    shutil.copytree(good, copy)
    with opened(tmp_path / "state", base, select="none") as merge:
        merge.fold(good)
    with opened(tmp_path / "state", base) as merge:
        told = merge.fold(good)
        assert (told.fate, told.commit.entry.fate, merge.pool()) == ("known", "folded", {})
        fill(merge, copy, quadratic.good(base, 1))
        found = rows(merge.round())
        assert found["copy"].fate in ("refused", "deferred")
        assert names(merge) == ["good0", "good1"]


def test_new_files_at_a_folded_place_follow_the_setting(tmp_path: Path, base: Path) -> None:
    place = quadratic.good(base, 0, "alice")
    with opened(tmp_path / "state", base) as merge:
        fill(merge, place)
        merge.round()
        assert names(merge) == ["alice"]
    shutil.rmtree(place)
    quadratic.good(base, 1, "alice")
    with opened(tmp_path / "state", base) as merge:
        told = merge.fold(place)
        assert (told.fate, told.reason) == ("refused", "update")
        merge.retry("alice")
    with opened(tmp_path / "state", base, updates="add") as merge:
        assert merge.fold(place).fate == "deferred"
        assert rows(merge.round())["alice"].fate == "folded"
        assert names(merge) == ["alice", "alice"]


def test_the_ledger_alone_gives_back_pool_fates_and_history(tmp_path: Path, base: Path) -> None:
    state = tmp_path / "state"

    def told(merge: api.Merge) -> Any:
        pool = {k: (w.commit.seq, w.since, w.rounds, dict(w.last)) for k, w in merge.pool().items()}
        keys = {(c.entry.candidate or {}).get("key") for c in merge.state.log}
        fates = {k: (f.seq, f.entry.fate, f.entry.reason, f.entry.message) if k and (f := merge.state.fate(k)) else None for k in keys}
        return list(pool.items()), fates, names(merge), dict(merge.state.totals), bits(merge), merge.state.open_round

    with opened(state, base, rounds={"patience": 1}) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.noise(base, 0))
        merge.round()
        fill(merge, quadratic.good(base, 1), quadratic.noise(base, 1))
    with opened(state, base, rounds={"patience": 5}) as merge:
        merge.round()
        fill(merge, quadratic.noise(base, 2))
        before = told(merge)
    with opened(state, base) as merge:
        assert told(merge) == before
        assert waits(merge) == ["noise1", "noise2"]
        assert merge.why("noise0").reason == "irrelevant"


def test_going_back_after_a_round_keeps_out_what_it_folded_until_asked(tmp_path: Path, base: Path) -> None:
    good = [quadratic.good(base, k) for k in range(2)]
    with opened(tmp_path / "state", base) as merge:
        fill(merge, good[0], quadratic.noise(base, 0))
        merge.round()
        back, before = merge.state.head.seq, bits(merge)
        fill(merge, good[1])
        merge.round()
        after = bits(merge)
        merge.state.rollback(back)
        assert (names(merge), bits(merge)) == (["good0"], before)
        assert waits(merge) == ["noise0"], "the pool is of today"
        assert merge.fold(good[1]).refused
        assert merge.why("good1").fate == "rolled-back"
        merge.retry("good1")
        fill(merge, good[1])
        assert rows(merge.round())["good1"].fate == "folded"
        assert bits(merge) == after


def test_why_has_every_round_with_its_company(tmp_path: Path, base: Path) -> None:
    noise = quadratic.noise(base, 0)
    with opened(tmp_path / "state", base, rounds={"patience": 9}) as merge:
        fill(merge, quadratic.good(base, 0), noise)
        first = merge.why(str(noise))
        assert (first.fate, first.reason, first.rounds) == ("deferred", "waiting", [])
        assert first.message == "noise0: waits in the pool for a round"
        found = rows(merge.round())
        fill(merge, quadratic.good(base, 1))
        merge.round()
        told = merge.why(first.key)
        assert (told.name, told.origin, told.since) == ("noise0", str(noise), first.since)
        assert [(r["members"], r["judged"]) for r in told.rounds] == [(2, 1), (2, 1)]
        assert (told.rounds[0]["score"], told.rounds[0]["z"]) == (found["noise0"].score, found["noise0"].z)
        assert all(r["objective"].startswith("blake3:") for r in told.rounds)
        folded = merge.why("good0")
        assert (folded.fate, folded.message) == ("folded", f"good0: folded as record {merge.state.folds()[0].seq}")


def test_adding_a_state_takes_what_it_brings_out_of_the_pool(tmp_path: Path, base: Path) -> None:
    good = quadratic.good(base, 0)
    with opened(tmp_path / "other", base, select="none") as merge:
        merge.fold(good)
    with opened(tmp_path / "state", base) as merge:
        fill(merge, good, quadratic.noise(base, 0))
        merge.combine(tmp_path / "other")
        assert (names(merge), waits(merge)) == (["good0"], ["noise0"])
