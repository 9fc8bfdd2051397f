"""Frank-Wolfe rounds on real files: the merge is the weighted sum the ledger says, through rounds, losses, twins, full
houses, rollbacks and kills."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.objectives import calibration
from continual.publish.folder import Target
from continual.selection.active import Active, active_at
from continual.selection.frank_wolfe import room
from continual.selection.in_memory import ModelInMemory
from continual.selection.mixing import mix
from tests.helpers import quadratic
from tests.helpers.pools import fill, names, rows, waits

STEPS = ("hard", "pairwise", "soft", "corrective")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


def opened(
    state: Path,
    base: Path,
    *,
    on_step: Callable[[str], None] | None = None,
    rounds: Mapping[str, Any] | None = None,
    **more: Any,
) -> api.Merge:
    if not state.exists():
        making.init(base, state, making.Recipe(rule="frank-wolfe"))
    asked = {
        "objective": "tests.helpers.quadratic:make",
        "max_base_ratio": 10.0,
        "device": "cpu",
        "state": state,
        "rounds": rounds or {},
    }
    return api.Merge(Settings(**{**asked, **more}), write=True, on_step=on_step)


def weights(merge: api.Merge) -> dict[str, tuple[float, ...]]:
    now = active_at(merge.state)
    return {now.members[key].name: found for key, found in now.weights.items()}


def merged(merge: api.Merge) -> dict[str, Tensor]:
    return {spec.name: merge.read(spec.name).double() for spec in merge.state.format.tensors}


def bits(merge: api.Merge) -> dict[str, bytes]:
    return {name: merge.state.read(name, "sum").tobytes() for name in merge.state.format.slots}


def vectors(base: Path, *named: str) -> dict[str, dict[str, Tensor]]:
    """Task vectors in float64."""
    origin = load_file(base / "model.safetensors")
    pool = base.parent / "pool"
    return {
        n: {t: v.double() - origin[t].double() for t, v in load_file(pool / n / "model.safetensors").items()}
        for n in named
    }


def layers(merge: api.Merge, *, by_layer: bool) -> dict[str, int]:
    loaded = ModelInMemory(
        merge.engine,
        calibration.load(merge.asked().calibration, merge.base.checkpoint.path, torch.device("cpu")),
        by_layer=by_layer,
    )
    return dict(loaded.layers)


def is_the_sum(
    merge: api.Merge, taus: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, tuple[float, ...]]
) -> None:
    """X = Σ w_i τ_i, tensor by tensor."""
    wide = max((len(w) for w in given.values()), default=1) > 1
    layer = layers(merge, by_layer=wide)
    for name, found in merged(merge).items():
        expected = sum((taus[m][name] * w[layer[name]] for m, w in given.items()), torch.zeros_like(found))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


class Best:
    """The loss on the driving rows as a function of weights, one of each model, and its least value over ρ·conv({0} ∪
    models): dense, in float64."""

    def __init__(self, base: Path, *named: str) -> None:
        loaded = calibration.load(calibration.Wanted("tests.helpers.quadratic:make"), base, torch.device("cpu"))
        origin = quadratic.flat(load_file(base / "model.safetensors")).double()
        taus = torch.stack([quadratic.flat(v) for v in vectors(base, *named).values()], dim=1)
        parts = []
        for dealt in loaded.dealt:
            task: Any = dealt.task
            signs, scale = task.signs[dealt.drive].double(), (len(dealt.drive) * len(loaded.dealt)) ** -0.5
            parts.append((scale * (signs @ taus), scale * (task.wanted[dealt.drive].double() - signs @ origin)))
        self.a, self.b = (torch.cat(side).numpy() for side in zip(*parts, strict=True))

    def loss(self, weights: Any) -> float:
        return float(0.5 * np.square(self.a @ np.asarray(weights) - self.b).sum())

    def optimum(self, rho: float) -> float:
        count = self.a.shape[1]
        found = minimize(
            self.loss,
            np.full(count, min(1.0, rho / count / 2)),
            jac=lambda w: self.a.T @ (self.a @ w - self.b),
            bounds=[(0, None)] * count,
            constraints={"type": "ineq", "fun": lambda w: rho - w.sum()},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return float(found.fun)


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_merge_is_the_sum_that_the_ledger_says(tmp_path: Path, base: Path, by_layer: bool) -> None:
    good, noise = [quadratic.good(base, k) for k in range(2)], [quadratic.noise(base, k) for k in range(2)]
    taus = vectors(base, "good0", "good1", "noise0", "noise1")
    with opened(tmp_path / "state", base, rounds={"layers": by_layer}) as merge:
        fill(merge, *good, *noise)
        found = merge.round()
        given = weights(merge)
        assert set(given) == {"good0", "good1"} == set(names(merge))
        assert {len(w) for w in given.values()} == {len(set(layers(merge, by_layer=by_layer).values()))}
        is_the_sum(merge, taus, given)
        assert (sorted(waits(merge)), found.folds) == (["noise0", "noise1"], 2)
        for name, row in rows(found).items():
            expected = sum(given[name]) / len(given[name]) if name in given else None
            assert (row.weight, row.fate) == (expected, "folded" if name in given else "deferred")
        square = sum(float(v.square().sum()) for v in merged(merge).values())
        assert merge.state.ledger.totals["merged_sq"] == pytest.approx(square, rel=1e-6)
        assert merge.state.ledger.totals["count"] == 2
        norms = sum(math.sqrt(sum(float(v.square().sum()) for v in taus[n].values())) for n in given)
        assert merge.state.ledger.totals["norm_sum"] == pytest.approx(norms, rel=1e-5)
        assert merge.state.verify() == []
        exported = load_file(merge.export(Target(tmp_path / "out")) / "model.safetensors")
    origin = load_file(base / "model.safetensors")
    with opened(tmp_path / "state", base) as merge:
        assert weights(merge) == given
        for name, value in merged(merge).items():
            torch.testing.assert_close(exported[name].double() - origin[name].double(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rho", [4.0, 0.8])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_comes_near_the_optimum_and_the_gap_bounds_how_near(
    tmp_path: Path, base: Path, step: str, rho: float
) -> None:
    pool = [quadratic.good(base, k) for k in range(2)]
    with opened(
        tmp_path / "state", base, rounds={"step": step, "layers": False, "rho": rho, "tolerance": 1e-3, "steps": 40}
    ) as merge:
        fill(merge, *pool, quadratic.noise(base, 0))
        heard: list[Any] = []
        found = merge.round(told=heard.append)
        given = weights(merge)
        assert set(given) == {"good0", "good1"}
        assert all(w > 0 for (w,) in given.values())
        assert sum(w for (w,) in given.values()) <= rho * (1 + 1e-9)
        is_the_sum(merge, vectors(base, "good0", "good1"), given)
    best = Best(base, *given)
    reached = best.loss([w for (w,) in given.values()])
    assert found.numbers["loss"] == pytest.approx(reached, rel=1e-4)
    least = best.optimum(rho)
    assert reached - least <= found.numbers["gap"] + 1e-4 * reached
    assert reached - least <= 0.02 * (found.numbers["before"] - least)
    assert (found.numbers["before"], found.numbers["steps"]) == (
        pytest.approx(best.loss([0.0, 0.0]), rel=1e-5),
        len(heard),
    )
    for taken in heard:
        assert taken.step == step
        assert taken.gap >= 0
    assert found.commit is not None
    assert (found.commit.entry.numbers or {})["gap"] == found.numbers["gap"]


def test_another_round_weighs_all_anew(tmp_path: Path, base: Path) -> None:
    """A better model of the same task comes: it takes weight from the one that is there, within ρ."""
    with opened(tmp_path / "state", base, rounds={"rho": 1.0, "layers": False}) as merge:
        fill(merge, quadratic.good(base, 0, "partly", share=0.6), quadratic.good(base, 1))
        merge.round()
        first, before = weights(merge), merge.state.ledger.head.seq
        assert set(first) == {"partly", "good1"}
        fill(merge, quadratic.good(base, 0, "better", seed=3), quadratic.noise(base, 0))
        found = merge.round()
        second = weights(merge)
        assert second["better"][0] > 0.1
        assert second.get("partly", (0.0,))[0] < first["partly"][0]
        assert sum(w for (w,) in second.values()) <= 1.0 + 1e-9
        assert found.numbers["loss"] < found.numbers["before"]
        taus = vectors(base, "partly", "good1", "better")
        is_the_sum(merge, taus, second)
        assert set(names(merge)) == set(second)
        third = merge.state.ledger.head.seq
        merge.state.rollback(before)
        assert weights(merge) == first
        assert set(names(merge)) == set(first)
        is_the_sum(merge, taus, first)
        assert not {"partly", "good1"} & set(waits(merge)), "what is in the merge does not wait"
        merge.state.rollback(third)
        assert weights(merge) == second
    with opened(tmp_path / "state", base) as merge:
        assert weights(merge) == second
        assert set(names(merge)) == set(second)


def test_a_round_over_nobody_new_changes_little_and_keeps_the_sum(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(2)))
        merge.round()
        assert merge.pool() == {}
        first = weights(merge)
        found = merge.round()
        assert set(rows(found)) == {"good0", "good1"}
        assert set(weights(merge)) == set(first)
        is_the_sum(merge, vectors(base, "good0", "good1"), weights(merge))
        with pytest.raises(Misconfigured, match="nothing waits"):
            merge.look_round()
    with opened(tmp_path / "empty", base) as merge, pytest.raises(Misconfigured, match="nothing waits"):
        merge.round()


def test_who_has_no_weight_any_more_waits_again(tmp_path: Path, base: Path) -> None:
    """Under a tight ρ a much better model drives a weak one out."""
    with opened(tmp_path / "state", base, rounds={"rho": 0.4, "layers": False, "step": "pairwise"}) as merge:
        weak = quadratic.good(base, 1, "weak", share=0.3)
        fill(merge, weak)
        merge.round()
        assert names(merge) == ["weak"]
        digest = merge.state.ledger.folds()[0].entry.digest or ""
        fill(merge, quadratic.good(base, 0, share=1.5))
        found = merge.round()
        assert names(merge) == ["good0"], rows(found)
        assert waits(merge) == ["weak"]
        assert rows(found)["weak"].fate == "deferred"
        assert merge.state.ledger.folded_digest(digest) is None
        is_the_sum(merge, vectors(base, "good0"), weights(merge))
        assert merge.why("weak").fate == "deferred"
        assert merge.fold(weak).reason == "waiting"
    with opened(tmp_path / "state", base, rounds={"rho": 4.0, "layers": False}) as merge:
        assert waits(merge) == ["weak"]
        merge.round()
        assert set(names(merge)) == {"good0", "weak"}
        is_the_sum(merge, vectors(base, "good0", "weak"), weights(merge))


@pytest.mark.parametrize("stays", [0.0, 4.0])
def test_a_model_that_the_others_make_useless_goes_again(tmp_path: Path, base: Path, stays: float) -> None:
    """Three of one task enter together; the third adds little that the two others have not."""
    asked = {"layers": False, "step": "soft", "sigmas": 4.0, "stays": stays}
    with opened(tmp_path / "state", base, rounds=asked) as merge:
        fill(merge, *(quadratic.good(base, 0, f"copy{i}", seed=i) for i in range(3)), quadratic.good(base, 1))
        found = rows(merge.round())
        out = {name for name, row in found.items() if row.fate == "deferred"}
        assert len(out) == (1 if stays else 0)
        assert set(names(merge)) == set(found) - out
        for name, row in found.items():
            assert row.z is not None
            assert (row.z < -stays) == (name not in out)
        is_the_sum(merge, vectors(base, *found), weights(merge))


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_model_whose_file_is_gone_stays_in_the_rest_and_can_only_shrink(
    tmp_path: Path, base: Path, by_layer: bool
) -> None:
    good = [quadratic.good(base, k) for k in range(3)]
    taus = vectors(base, "good0", "good1", "good2")
    with opened(tmp_path / "state", base, rounds={"layers": by_layer}) as merge:
        fill(merge, good[0], good[1])
        merge.round()
        first = weights(merge)
        shutil.rmtree(good[0])
        fill(merge, good[2])
        found = merge.round()
        now = active_at(merge.state)
        assert set(weights(merge)) == {"good1", "good2"}
        assert set(names(merge)) == {"good0", "good1", "good2"}, "it is in the merge still"
        assert found.numbers["loss"] < found.numbers["before"]
        assert all(0 < r <= w * (1 + 1e-9) for r, w in zip(now.rest, first["good0"], strict=True))
        is_the_sum(merge, taus, {**weights(merge), "good0": now.rest})
        assert waits(merge) == []
        assert merge.state.ledger.totals["count"] == 3
        merge.round()
        again = active_at(merge.state)
        assert all(r <= w * (1 + 1e-9) for r, w in zip(again.rest, now.rest, strict=True))
        is_the_sum(merge, taus, {**weights(merge), "good0": again.rest})
        assert merge.state.verify() == []


def test_in_a_full_house_the_lightest_make_room_and_stay_in_the_sum(tmp_path: Path, base: Path) -> None:
    good = [quadratic.good(base, k) for k in range(3)]
    taus = vectors(base, "good0", "good1", "good2")
    with opened(tmp_path / "state", base, rounds={"active": 2, "layers": False}) as merge:
        fill(merge, good[0], good[1])
        merge.round()
        first = weights(merge)
        assert set(first) == {"good0", "good1"}
        lightest = min(first, key=lambda name: first[name])
        fill(merge, good[2])
        found = merge.round()
        now = active_at(merge.state)
        assert len(now.weights) <= 2
        assert rows(found)["good2"].fate == "folded"
        assert set(names(merge)) == {"good0", "good1", "good2"}
        assert 0 < now.rest[0] <= first[lightest][0] * (1 + 1e-9)
        is_the_sum(merge, taus, {**weights(merge), lightest: now.rest})
        assert waits(merge) == []
        merge.round()
        again = active_at(merge.state)
        assert again.rest[0] <= now.rest[0] * (1 + 1e-9)
        is_the_sum(merge, taus, {**weights(merge), lightest: again.rest})


def test_room_is_made_only_where_somebody_waits() -> None:
    now = Active({"a": (0.5, 0.1), "b": (0.1, 0.1), "c": (1.0, 0.0), "d": (0.2, 0.9)}, (0.5, 0.0), {}, {})
    waiting: Any = [object()] * 9
    assert room(now, [], 4) == now
    assert room(now, waiting, 8) == now
    made = room(now, waiting, 4)
    assert (list(made.weights), made.rest) == (["a", "c", "d"], (0.6, 0.1))
    assert list(room(now, waiting, 1).weights) == ["d"]
    assert list(room(now, waiting[:1], 16).weights) == list(now.weights)


@pytest.mark.parametrize("later", [False, True])
def test_a_twin_gets_no_second_place_and_the_sum_is_the_same(tmp_path: Path, base: Path, later: bool) -> None:
    """Soft steps take both, as their slopes are the same: the weight of one is added to that of the other."""
    good, other = quadratic.good(base, 0), quadratic.good(base, 1)
    twin = base.parent / "pool/twin"
    shutil.copytree(good, twin)
    taus = vectors(base, "good0", "good1")
    asked = {"layers": False, "step": "soft"}
    if later:
        with opened(tmp_path / "state", base, rounds={**asked, "rho": 0.3}) as merge:
            fill(merge, good)
            merge.round()
            assert names(merge) == ["good0"]
    with opened(tmp_path / "state", base, rounds=asked) as merge:
        fill(merge, *([twin, other] if later else [good, twin, other]))
        found = rows(merge.round())
        first, second = ("good0", "twin") if found["twin"].reason == "duplicate" else ("twin", "good0")
        assert not later or first == "good0", "who is there stays"
        assert (found[second].fate, found[second].reason) == ("refused", "duplicate")
        assert f"duplicate of {first}" in found[second].message
        assert sorted(names(merge)) == sorted([first, "good1"])
        given = weights(merge)
        is_the_sum(merge, {**taus, "twin": taus["good0"]}, given)
        assert merge.state.ledger.totals["count"] == 2
        assert merge.why(second).reason == "duplicate"
        assert merge.pool() == {}
        assert sum(w for (w,) in given.values()) == pytest.approx(merge.state.ledger.totals["weight"])


def test_a_kill_leaves_the_weights_as_they_were_and_the_round_is_repeated(tmp_path: Path, base: Path) -> None:
    state = tmp_path / "state"
    with opened(state, base) as merge:
        fill(merge, quadratic.good(base, 0))
        merge.round()
        fill(merge, quadratic.good(base, 1), quadratic.noise(base, 0))
        first, before = weights(merge), bits(merge)
    seen: list[tuple[str, int]] = []

    def keep(step: str) -> None:
        seen.append((step, merge.state.ledger.head.seq))
        shutil.copytree(state, tmp_path / "killed" / str(len(seen) - 1))

    with opened(state, base, on_step=keep) as merge:
        found = merge.round()
        second, after = weights(merge), bits(merge)
        table = [(row.name, row.fate, row.score, row.z, row.weight) for row in found.rows]
    assert second != first
    assert [step for step, _ in seen].count("begin") == 1
    for number, (step, head) in enumerate(seen):
        place = tmp_path / "killed" / str(number)
        with opened(place, base) as merge:
            assert merge.state.verify() == []
            assert merge.state.ledger.head.seq == head
            if weights(merge) != second:
                assert (weights(merge), bits(merge)) == (first, before), step
                again = merge.round()
                assert [(row.name, row.fate, row.score, row.z, row.weight) for row in again.rows] == table
                assert [c.entry.kind for c in merge.state.ledger.log].count("round") == 2
            assert (weights(merge), bits(merge)) == (second, after)
            assert merge.state.ledger.open_round is None
            assert merge.state.orphans == () or step
            assert merge.state.verify() == []
        shutil.rmtree(place)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_model_is_taken_out_and_the_other_weights_stay(tmp_path: Path, base: Path, by_layer: bool) -> None:
    good = [quadratic.good(base, k) for k in range(3)]
    taus = vectors(base, "good0", "good1", "good2")
    with opened(tmp_path / "state", base, rounds={"layers": by_layer}) as merge:
        fill(merge, *good)
        merge.round()
        first = weights(merge)
        merge.unfold(merge.look_unfold("good2"))
        merge.unfold(merge.look_unfold("good0"))
        assert (names(merge), weights(merge)) == (["good1"], {"good1": first["good1"]})
        is_the_sum(merge, taus, weights(merge))
        assert merge.state.ledger.totals["count"] == 1
        assert merge.state.ledger.totals["merged_sq"] == pytest.approx(
            sum(float(v.square().sum()) for v in merged(merge).values()), rel=1e-5
        )
        assert merge.fold(good[0]).refused
        assert merge.why("good0").fate == "unfolded"
    with opened(tmp_path / "state", base, rounds={"layers": by_layer}) as merge:
        assert weights(merge) == {"good1": first["good1"]}
        merge.retry("good0")
        fill(merge, good[0])
        merge.round()
        assert set(names(merge)) == {"good0", "good1"}
        is_the_sum(merge, taus, weights(merge))
        for name in ("good0", "good1"):
            merge.unfold(merge.look_unfold(name))
        assert (names(merge), weights(merge)) == ([], {})
        assert all(not value.any() for value in merged(merge).values())
        assert merge.state.verify() == []


def test_a_model_without_a_weight_of_its_own_cannot_be_taken_out(tmp_path: Path, base: Path) -> None:
    good = [quadratic.good(base, k) for k in range(3)]
    with opened(tmp_path / "state", base, rounds={"active": 2, "layers": False}) as merge:
        fill(merge, *good[:2])
        merge.round()
        fill(merge, good[2])
        merge.round()
        (alone,) = set(names(merge)) - set(weights(merge))
        before = bits(merge), merge.state.ledger.head.seq
        with pytest.raises(Misconfigured, match=f"{alone} is in the merge, and has no weight of its own any more"):
            merge.unfold(merge.look_unfold(alone))
        assert (bits(merge), merge.state.ledger.head.seq) == before


def test_two_weighed_merges_are_not_added_and_it_is_said_what_to_do(tmp_path: Path, base: Path) -> None:
    for name in ("state", "other"):
        with opened(tmp_path / name, base) as merge:
            fill(merge, quadratic.good(base, 0, name))
            merge.round()
    with (
        opened(tmp_path / "other", base) as merge,
        pytest.raises(Misconfigured, match="let the models of both states wait for rounds of one"),
    ):
        merge.combine(tmp_path / "state")


def test_refused_in_the_round_that_folded_others_can_be_tried_again(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base, rounds={"patience": 1}) as merge:
        noise = quadratic.noise(base, 0)
        fill(merge, quadratic.good(base, 0), noise)
        assert rows(merge.round())["noise0"].fate == "refused"
        assert merge.fold(noise).refused
        assert len(merge.retry("noise0")) == 1
        assert merge.fold(noise).fate == "deferred"
        with pytest.raises(Misconfigured, match="good0"):
            merge.retry("good0")


@pytest.mark.parametrize("rest", [(), (0.25,)])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_mixed_is_the_sum_however_small_the_weights_were(rest: tuple[float, ...], seed: int) -> None:
    """In float32, as a merge is kept: a share of X that blew up its rounding would show."""
    random = torch.Generator().manual_seed(seed)
    keys = ["a", "b", "c", "d"]
    taus = torch.randn(len(keys) + bool(rest), 200, generator=random, dtype=torch.float64)
    before = torch.rand(len(taus), 1, generator=random, dtype=torch.float64)
    before[seed % 4] = 10.0 ** -(seed + 2)
    after = torch.rand(len(taus), 1, generator=random, dtype=torch.float64)
    if seed > 2:
        before[(seed + 1) % 4] = 0.0
        after[(seed + 2) % 4] = 0.0
    if rest:
        before[-1], after[-1] = rest[0], 0.5 * rest[0]
    x = (before.T @ taus)[0].float()
    found = mix(before, after, rest, keys)
    mixed = x * found.keep[0]
    for key, (scale,) in found.add.items():
        mixed.add_(taus[keys.index(key)].float(), alpha=scale)
    torch.testing.assert_close(mixed.double(), (after.T @ taus)[0], rtol=0, atol=2e-6)


def test_what_does_not_change_is_not_read() -> None:
    before = torch.tensor([[0.5, 0.2], [0.3, 0.0], [0.1, 0.4]], dtype=torch.float64)
    same = mix(before, before, (), ["a", "b", "c"])
    assert (same.keep, same.add) == ((1.0, 1.0), {})
    after = before.clone()
    after[1] = torch.tensor([0.35, 0.0])
    one = mix(before, after, (), ["a", "b", "c"])
    assert (one.keep, set(one.add)) == ((1.0, 1.0), {"b"})
    scaled = mix(before, 0.5 * before, (), ["a", "b", "c"])
    assert (scaled.keep, scaled.add) == ((0.5, 0.5), {})
    nothing = mix(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), (), ["a"])
    assert dict(nothing.add) == {"a": (1.0,)}
