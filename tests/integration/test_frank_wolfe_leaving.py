"""Models that leave a Frank-Wolfe merge, or that it cannot weigh any more, on real files; and a kill in a round."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from continual.errors import Misconfigured, Refuse
from continual.selection.active import active_at
from continual.state.verify import verify
from tests.helpers import quadratic
from tests.helpers.pools import files, fill, names, rows, waits
from tests.helpers.weighed import bits, is_the_sum, merged, opened, vectors, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


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
        assert found.loss < found.before
        assert all(0 < r <= w * (1 + 1e-9) for r, w in zip(now.rest, first["good0"], strict=True))
        is_the_sum(merge, taus, {**weights(merge), "good0": now.rest})
        assert waits(merge) == []
        assert merge.state.ledger.totals.count == 3
        merge.round()
        again = active_at(merge.state)
        assert all(r <= w * (1 + 1e-9) for r, w in zip(again.rest, now.rest, strict=True))
        is_the_sum(merge, taus, {**weights(merge), "good0": again.rest})
        assert verify(merge.state) == []


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
        everything = sum(w for (w,) in weights(merge).values()) + now.rest[0]
        assert merge.state.ledger.totals.weight == pytest.approx(everything)
        is_the_sum(merge, taus, {**weights(merge), lightest: now.rest})
        assert waits(merge) == []
        merge.round()
        again = active_at(merge.state)
        assert again.rest[0] <= now.rest[0] * (1 + 1e-9)
        is_the_sum(merge, taus, {**weights(merge), lightest: again.rest})


def test_a_kill_leaves_the_weights_as_they_were_and_the_round_is_repeated(tmp_path: Path, base: Path) -> None:
    state = tmp_path / "state"
    with opened(state, base) as merge:
        fill(merge, quadratic.good(base, 0))
        merge.round()
        fill(merge, quadratic.good(base, 1), quadratic.noise(base, 0))
        first, before = weights(merge), bits(merge)
    seen: list[tuple[str, int]] = []
    steps: list[str] = []
    kept: list[dict[str, bytes]] = []

    def keep(step: str) -> None:
        """Where a step changes no file, a kill leaves what one before it leaves."""
        steps.append(step)
        if (now := files(state)) not in kept:
            kept.append(now)
            seen.append((step, merge.state.ledger.head.seq))
            shutil.copytree(state, tmp_path / "killed" / str(len(seen) - 1))

    with opened(state, base, on_step=keep) as merge:
        found = merge.round()
        second, after = weights(merge), bits(merge)
        table = [(row.name, row.fate, row.score, row.z, row.weight) for row in found.rows]
    assert second != first
    assert steps.count("begin") == 1
    for number, (step, head) in enumerate(seen):
        place = tmp_path / "killed" / str(number)
        with opened(place, base) as merge:
            assert verify(merge.state) == []
            assert merge.state.ledger.head.seq == head
            if weights(merge) != second:
                assert (weights(merge), bits(merge)) == (first, before), step
                again = merge.round()
                assert [(row.name, row.fate, row.score, row.z, row.weight) for row in again.rows] == table
                assert [c.entry.kind for c in merge.state.ledger.log].count("round") == 2
            assert (weights(merge), bits(merge)) == (second, after)
            assert merge.state.ledger.open_round is None
            assert merge.state.orphans == () or step
            assert verify(merge.state) == []
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
        assert merge.state.ledger.totals.count == 1
        assert merge.state.ledger.totals.merged_sq == pytest.approx(
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
        assert verify(merge.state) == []


def test_a_model_that_was_moved_is_taken_out_from_where_it_is_now(tmp_path: Path, base: Path) -> None:
    """Its content tells that it is the one, as under every other rule."""
    with opened(tmp_path / "state", base) as merge:
        fill(merge, *(quadratic.good(base, k) for k in range(2)))
        merge.round()
        first, before = weights(merge), bits(merge)
        moved = tmp_path / "moved"
        shutil.copytree(base.parent / "pool/good0", moved)
        shutil.rmtree(base.parent / "pool/good0")
        head = merge.state.ledger.head
        with pytest.raises(Refuse, match="does not hold what was folded as record"):
            merge.unfold(merge.look_unfold("good0", at=quadratic.good(base, 2)))
        assert (merge.state.ledger.head, weights(merge), bits(merge)) == (head, first, before)
        merge.unfold(merge.look_unfold("good0", at=moved))
        assert weights(merge) == {"good1": first["good1"]}
        is_the_sum(merge, vectors(base, "good1"), weights(merge))


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


def test_a_rest_that_is_driven_out_leaves_the_merge_with_its_models(tmp_path: Path, base: Path) -> None:
    """Its files are gone, so it waits until the next round finds that."""
    tight = {"rho": 0.4, "layers": False, "step": "pairwise"}
    with opened(tmp_path / "state", base, rounds=tight) as merge:
        weak = quadratic.good(base, 1, "weak", share=0.3)
        fill(merge, weak)
        merge.round()
        shutil.rmtree(weak)
        fill(merge, quadratic.good(base, 0, share=1.5))
        merge.round()
        now = active_at(merge.state)
        assert (names(merge), list(weights(merge)), now.rest) == (["good0"], ["good0"], ())
        assert (waits(merge), merge.state.ledger.totals.count) == (["weak"], 1)
        is_the_sum(merge, vectors(base, "good0"), weights(merge))
        assert rows(merge.round())["weak"].reason == "gone"
        assert waits(merge) == []


def test_a_twin_of_a_model_in_the_rest_gives_its_weight_to_the_rest(tmp_path: Path, base: Path) -> None:
    good = quadratic.good(base, 0)
    taus = vectors(base, "good0")
    asked = {"layers": False, "step": "soft"}
    with opened(tmp_path / "state", base, rounds={**asked, "rho": 0.3}) as merge:
        fill(merge, good)
        merge.round()
        first = weights(merge)["good0"][0]
    shutil.move(good, good.parent / "twin")
    with opened(tmp_path / "state", base, rounds=asked) as merge:
        fill(merge, good.parent / "twin")
        found = rows(merge.round())
        assert (found["twin"].fate, found["twin"].reason) == ("refused", "duplicate")
        now = active_at(merge.state)
        assert (names(merge), weights(merge), waits(merge)) == (["good0"], {}, [])
        assert now.rest[0] > 2 * first
        assert merge.state.ledger.totals.weight == pytest.approx(now.rest[0])
        is_the_sum(merge, taus, {"good0": now.rest})
