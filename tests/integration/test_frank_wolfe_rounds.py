"""Frank-Wolfe rounds on real files: the merge is the weighted sum the ledger says, through rounds, losses, twins, full
houses, rollbacks and kills."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual.errors import Misconfigured
from continual.executors.contract import silent
from continual.publish.folder import Target
from continual.selection.active import active_at
from continual.selection.frank_wolfe import MergedVector, Search, SearchSpace
from continual.state.entries import SelectEntry
from continual.state.verify import verify
from tests.helpers import quadratic
from tests.helpers.pools import fill, loaded, names, rows, waits
from tests.helpers.weighed import STEPS, Best, is_the_sum, layers, merged, opened, vectors, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


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
        assert merge.state.ledger.totals.merged_sq == pytest.approx(square, rel=1e-6)
        assert merge.state.ledger.totals.count == 2
        norms = sum(math.sqrt(sum(float(v.square().sum()) for v in taus[n].values())) for n in given)
        assert merge.state.ledger.totals.norm_sum == pytest.approx(norms, rel=1e-5)
        assert verify(merge.state) == []
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
    assert found.loss == pytest.approx(reached, rel=1e-4)
    least = best.optimum(rho)
    assert reached - least <= found.gap + 1e-4 * reached
    assert reached - least <= 0.02 * (found.before - least)
    assert (found.before, found.steps) == (
        pytest.approx(best.loss([0.0, 0.0]), rel=1e-5),
        len(heard),
    )
    for taken in heard:
        assert taken.step == step
        assert taken.gap >= 0
    assert found.commit is not None
    assert found.commit.of_kind(SelectEntry).gap == found.gap


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
        assert found.loss < found.before
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


def test_a_round_that_changes_no_weight_is_a_record_and_no_tensor_is_written(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base, rounds={"tolerance": 5.0, "layers": False}) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(2)))
        merge.round()
        first, head = weights(merge), merge.state.ledger.head
        assert first
        fill(merge, quadratic.noise(base, 0))
        found = merge.round()
        assert (found.steps, found.folds, weights(merge)) == (0, 0, first)
        assert found.commit is not None
        assert found.commit.generation == head.generation
        entry = found.commit.of_kind(SelectEntry)
        assert (entry.active, entry.rest, entry.folds, entry.out, entry.totals) == (None, None, None, None, None)
        assert {row.name: row.fate for row in found.rows if row.name in first} == dict.fromkeys(first, "folded")


def test_weights_by_layer_stay_so_when_the_setting_changes(tmp_path: Path, base: Path) -> None:
    taus = vectors(base, *(quadratic.good(base, k).name for k in range(3)))
    pool = base.parent / "pool"
    with opened(tmp_path / "state", base, rounds={"layers": True}) as merge:
        fill(merge, pool / "good0", pool / "good1")
        merge.round()
        count = {len(w) for w in weights(merge).values()}
        assert count == {len(set(layers(merge, by_layer=True).values()))} != {1}
    with opened(tmp_path / "state", base, rounds={"layers": False}) as merge:
        fill(merge, pool / "good2")
        merge.round()
        assert set(weights(merge)) == {"good0", "good1", "good2"}
        assert {len(w) for w in weights(merge).values()} == count
        is_the_sum(merge, taus, weights(merge))


def test_a_dry_run_looks_from_the_sum_as_it_is(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0))
        reached = merge.round().loss
        fill(merge, quadratic.good(base, 1))
        assert merge.look_round().loss == pytest.approx(reached, rel=1e-5)


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
    asked = {"layers": False, "step": "soft", "sigmas": 4.0, "stays": stays, "steps": 8}
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
        assert merge.state.ledger.totals.count == 2
        assert merge.why(second).reason == "duplicate"
        assert merge.pool() == {}
        assert sum(w for (w,) in given.values()) == pytest.approx(merge.state.ledger.totals.weight)


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


def test_where_nobody_helps_nothing_is_promised(tmp_path: Path, base: Path) -> None:
    """A model away from the target has a slope above zero: at the base there is nothing to gain in the hull."""
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0, "away", share=-1.0), quadratic.good(base, 1, "off", share=-0.5))
        found = merge.round()
        assert (found.gap, found.pool_gap, found.steps, found.folds) == (0.0, 0.0, 0, 0)
        assert found.loss == found.before
        assert {(row.fate, row.z) for row in found.rows} == {("deferred", None)}
        assert all(row.score is not None and row.score > 0 for row in found.rows)


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_rest_is_one_more_vertex_with_the_slope_of_what_it_is_made_of(
    tmp_path: Path, base: Path, by_layer: bool
) -> None:
    """A model that is not weighed any more is known by what X has besides the others: its slope is the same."""
    with opened(tmp_path / "state", base, rounds={"layers": by_layer}) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(2)))
        merge.round()
        now = active_at(merge.state)
        first, second = sorted(now.weights, key=lambda key: now.members[key].name)
        alone = now._replace(weights={second: now.weights[second]}, rest=now.weights[first])
        reading = merge.reading()
        merged_vector = MergedVector(reading.unit, reading.need, fixed=False)
        found = []
        for active in (now, alone):
            space = SearchSpace(loaded(merge, by_layer=by_layer), merged_vector, active, ())
            search = Search(space, merge.asked(), silent)
            loss, slopes = search.gradient(search.start())
            found.append((loss, dict(zip([*search.keys, *([first] if search.rest else [])], slopes, strict=True))))
    (loss, slopes), (other, others) = found
    assert other == pytest.approx(loss, rel=1e-6)
    for key in (first, second):
        torch.testing.assert_close(others[key], slopes[key], rtol=1e-3, atol=1e-4 * float(slopes[key].abs().max()))
