"""Taking models out of a merge and adding two merges, on real files: what is left is what folding the others alone
gives, and a kill leaves it as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured, Refuse
from continual.rules import RULES, rule
from continual.state.entries import UnfoldEntry
from continual.state.verify import verify
from tests.helpers import models
from tests.helpers.streams import FOLDING

pytestmark = pytest.mark.slow

GROUPS = [name for name in RULES if rule(name).laws.combine]
OTHERS = [name for name in FOLDING if not rule(name).laws.combine]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Of one layer: every tensor is folded some forty times."""
    return models.base(tmp_path / "base", shapes={n: s for n, s in models.SHAPES.items() if ".layers.1." not in n})


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> list[Path]:
    return [models.ship(models.fine_tune(base, tmp_path / f"ft-{i}", i), i) for i in range(5)]


def opened(state: Path, base: Path, name: str, **settings: object) -> api.Merge:
    if not state.exists():
        making.init(base, state, making.Recipe(rule=name))
    return api.Merge(Settings(state=state, **settings), write=True)  # type: ignore[arg-type]


def merged(merge: api.Merge) -> dict[str, torch.Tensor]:
    return {spec.name: merge.read(spec.name) for spec in merge.state.format.tensors}


def alone(state: Path, base: Path, name: str, fine_tunes: list[Path], **settings: object) -> dict[str, torch.Tensor]:
    with opened(state, base, name, **settings) as merge:
        for model in fine_tunes:
            assert merge.fold(model).fate == "folded"
        return merged(merge)


def names(merge: api.Merge) -> list[str]:
    return [c.entry.candidate.name for c in merge.state.ledger.folds()]


@pytest.mark.parametrize("name", GROUPS)
def test_a_subtracted_model_leaves_what_the_others_give(
    tmp_path: Path, base: Path, tuned: list[Path], name: str
) -> None:
    expected = alone(tmp_path / "without", base, name, tuned[:1] + tuned[2:])
    with opened(tmp_path / "state", base, name) as merge:
        for model in tuned:
            merge.fold(model)
        plan = merge.look_unfold("ft-1")
        assert (plan.exact, plan.seq, [a.name for a in plan.again]) == (True, 2, ["ft-1"])
        merge.unfold(plan)
    with opened(tmp_path / "state", base, name) as merge:
        assert names(merge) == ["ft-0", "ft-2", "ft-3", "ft-4"]
        for tensor, value in merged(merge).items():
            torch.testing.assert_close(value, expected[tensor], rtol=1e-4, atol=2e-7)
        again = merge.fold(tuned[1])
        assert (again.fate, again.refused, "unfolded" in again.message) == ("known", True, True)
        assert "'continual retry" in again.message
        merge.retry("ft-1")
        assert merge.fold(tuned[1]).fate == "folded"


@pytest.mark.parametrize("name", GROUPS)
def test_the_last_model_out_leaves_the_base(tmp_path: Path, base: Path, tuned: list[Path], name: str) -> None:
    with opened(tmp_path / "state", base, name) as merge:
        for model in tuned[:3]:
            merge.fold(model)
        for word in ("2", "ft-0", str(tuned[2])):
            merge.unfold(merge.look_unfold(word))
        assert names(merge) == []
        assert not any(bool(value.any()) for value in merged(merge).values())
        assert not any(
            bool(merge.state.read(s.name, slot).any())
            for s in merge.state.format.tensors
            for slot in merge.rule.slots(s)
        )


@pytest.mark.parametrize("grams", ["float32", "float64"])
@pytest.mark.parametrize("name", ["gram", "flow"])
def test_a_light_model_is_not_lost_with_a_heavy_one(
    tmp_path: Path, base: Path, tuned: list[Path], name: str, grams: str
) -> None:
    """What a subtraction leaves by rounding would hide it: the others are folded again instead."""
    light = {"float32": 3e-5, "float64": 3e-7}[grams]
    made = making.Recipe(rule=name, options={"grams": grams})
    for state in ("state", "without"):
        making.init(base, tmp_path / state, made)
    expected = alone(tmp_path / "without", base, name, tuned[1:2], weights={"ft-1": light})
    assert any(bool(value.any()) for value in expected.values())
    with opened(tmp_path / "state", base, name, weights={"ft-1": light}) as merge:
        for model in tuned[:2]:
            merge.fold(model)
        plan = merge.look_unfold("ft-0")
        assert (plan.exact, [again.name for again in plan.again]) == (False, ["ft-1"])
        merge.unfold(plan)
        assert all(torch.equal(value, expected[tensor]) for tensor, value in merged(merge).items())
        assert verify(merge.state) == []
        merge.fold(tuned[2])
        assert merge.look_unfold("ft-1").exact, "the light one can be subtracted"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("keep", "start"), [(4, 2), (1, None)])
def test_where_folding_is_no_addition_the_later_models_are_folded_again(
    tmp_path: Path, base: Path, tuned: list[Path], name: str, keep: int, start: int | None
) -> None:
    """With the weights that they were folded with, whatever the settings say by then."""
    weights = {"ft-1": 2.0, "ft-4": 0.5} if rule(name).laws.weighted else {}
    expected = alone(tmp_path / "without", base, name, tuned[:2] + tuned[3:], weights=weights)
    with opened(tmp_path / "state", base, name, keep=keep, weights=weights) as merge:
        for model in tuned:
            merge.fold(model)
    with opened(tmp_path / "state", base, name, keep=keep) as merge:
        plan = merge.look_unfold("ft-2")
        assert (plan.exact, plan.start) == (False, start)
        assert [a.name for a in plan.again] == ["ft-3", "ft-4"] if start else ["ft-0", "ft-1", "ft-3", "ft-4"]
        head = merge.state.ledger.head.seq
        commit = merge.unfold(plan)
        assert commit.seq == head + 1, "one record"
        assert len(list((tmp_path / "state/generations").iterdir())) == len(merge.state.generations()), (
            "no scratch is left"
        )
    with opened(tmp_path / "state", base, name) as merge:
        assert names(merge) == ["ft-0", "ft-1", "ft-3", "ft-4"]
        assert all(torch.equal(value, expected[tensor]) for tensor, value in merged(merge).items())
        assert verify(merge.state) == []
        if keep > 1:
            merge.state.rollback(5)
            assert names(merge) == ["ft-0", "ft-1", "ft-2", "ft-3", "ft-4"]


def test_a_second_one_taken_out_does_not_begin_on_what_holds_the_first(
    tmp_path: Path, base: Path, tuned: list[Path]
) -> None:
    expected = alone(tmp_path / "without", base, "opcm", [tuned[0], tuned[2], tuned[4]])
    with opened(tmp_path / "state", base, "opcm", keep=9) as merge:
        for model in tuned:
            merge.fold(model)
        merge.unfold(merge.look_unfold("ft-1"))
        plan = merge.look_unfold("ft-3")
        assert plan.start == 1, "the generations of records 3 and 4 hold ft-1"
        merge.unfold(plan)
        assert all(torch.equal(value, expected[tensor]) for tensor, value in merged(merge).items())


def test_the_newest_of_an_order_bound_rule_goes_without_reading_any_model(
    tmp_path: Path, base: Path, tuned: list[Path]
) -> None:
    with opened(tmp_path / "state", base, "opcm") as merge:
        for model in tuned[:2]:
            merge.fold(model)
        before = merged(merge)
        merge.fold(tuned[2])
        shutil.rmtree(tuned[2])
        merge.unfold(merge.look_unfold("ft-2"))
        assert all(torch.equal(value, before[tensor]) for tensor, value in merged(merge).items())
        merge.unfold(merge.look_unfold("ft-1"))
        merge.unfold(merge.look_unfold("ft-0"))
        assert not any(bool(value.any()) for value in merged(merge).values())


@pytest.mark.parametrize("name", ["mean", "opcm"])
def test_what_cannot_be_read_any_more_is_said_and_nothing_changes(
    tmp_path: Path, base: Path, tuned: list[Path], name: str
) -> None:
    with opened(tmp_path / "state", base, name, keep=9) as merge:
        for model in tuned[:3]:
            merge.fold(model)
        before, head = merged(merge), merge.state.ledger.head.seq
        with pytest.raises(Misconfigured, match="no model of this name"):
            merge.look_unfold("ft-9")
        moved = tuned[1].rename(tmp_path / "moved")
        advice = "; name where it is now with --at" if name == "mean" else "; put ft-1 back, or roll back"
        with pytest.raises(Misconfigured, match=rf"ft-1 \(record 2\) cannot be read.*{advice}$"):
            merge.look_unfold("ft-1" if name == "mean" else "ft-0")
        moved.rename(tuned[1])
        shutil.rmtree(tuned[2])
        models.fine_tune(base, tuned[2], 7)
        with pytest.raises(Refuse, match="does not hold what was folded as record 3"):
            merge.unfold(merge.look_unfold("ft-2" if name == "mean" else "ft-1"))
        assert merge.state.ledger.head.seq == head
        assert all(torch.equal(value, before[tensor]) for tensor, value in merged(merge).items())
    with opened(tmp_path / "state", base, name) as merge:
        assert merge.state.orphans == ()


def test_a_name_that_two_models_have_is_not_enough(tmp_path: Path, base: Path) -> None:
    models.fine_tune(base, tmp_path / "one/ft", 1)
    models.fine_tune(base, tmp_path / "other/ft", 2)
    with opened(tmp_path / "state", base, "mean") as merge:
        keys = [merge.fold(tmp_path / place / "ft").key for place in ("one", "other")]
        with pytest.raises(Misconfigured, match=r"; name one by its record number, or by its key$") as raised:
            merge.look_unfold("ft")
        assert f"ft: 2 models in the merge answer to it: ft (record 1, key {keys[0]}), " in str(raised.value)
        assert merge.look_unfold("2").key == keys[1]
        plan = merge.look_unfold(str(keys[0]))
        merge.unfold(plan)
        assert merge.state.ledger.head.of_kind(UnfoldEntry).again == ()
        assert names(merge) == ["ft"]


def test_the_record_names_the_models_that_were_folded_again(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    with opened(tmp_path / "state", base, "opcm", keep=9) as merge:
        for model in tuned[:3]:
            merge.fold(model)
        merge.unfold(merge.look_unfold("ft-1"))
        assert merge.state.ledger.head.of_kind(UnfoldEntry).again == (3,)


def test_a_moved_model_is_subtracted_from_where_it_is(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    with opened(tmp_path / "state", base, "ties") as merge:
        merge.fold(tuned[0])
        moved = tuned[0].rename(tmp_path / "moved")
        merge.unfold(merge.look_unfold("ft-0", moved))
        assert names(merge) == []


@pytest.mark.parametrize("name", GROUPS)
def test_two_states_combined_are_as_if_one_had_folded_all(
    tmp_path: Path, base: Path, tuned: list[Path], name: str
) -> None:
    expected = alone(tmp_path / "all", base, name, tuned)
    alone(tmp_path / "other", base, name, tuned[3:])
    with opened(tmp_path / "state", base, name) as merge:
        for model in tuned[:3]:
            merge.fold(model)
        folds, combined = merge.combine(tmp_path / "other")
        assert (len(folds), combined and combined.commit.seq) == (2, 4)
    with opened(tmp_path / "state", base, name) as merge:
        assert names(merge) == [f"ft-{i}" for i in range(5)]
        assert merge.state.ledger.totals.body() == pytest.approx(
            api.open(tmp_path / "all").state.ledger.totals.body(), rel=1e-6
        )
        for tensor, value in merged(merge).items():
            torch.testing.assert_close(value, expected[tensor], rtol=1e-4, atol=1e-7)
        assert merge.fold(tuned[4]).fate == "known", "what came with the other state is not folded twice"
        merge.unfold(merge.look_unfold("ft-3"))
        assert names(merge) == ["ft-0", "ft-1", "ft-2", "ft-4"]
        merge.state.rollback(3)
        assert names(merge) == ["ft-0", "ft-1", "ft-2"]
        merge.state.rollback(4)
        assert names(merge) == [f"ft-{i}" for i in range(5)]
        assert verify(merge.state) == []


def test_states_that_cannot_be_combined_are_refused(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    alone(tmp_path / "mean", base, "mean", tuned[:2])
    alone(tmp_path / "same", base, "mean", tuned[1:3])
    alone(tmp_path / "sum", base, "task-arithmetic", tuned[:1])
    shutil.copytree(tmp_path / "mean", tmp_path / "copy")
    other_base = models.base(tmp_path / "other-base", seed=5)
    alone(tmp_path / "elsewhere", other_base, "mean", [models.fine_tune(other_base, tmp_path / "x", 1)])
    making.init(base, tmp_path / "empty", making.Recipe(rule="mean"))
    with opened(tmp_path / "mean", base, "mean") as merge:
        for place, words in (
            ("same", r"1 model is in both states \(ft-1\)"),
            ("sum", "have to be the same"),
            ("copy", "copies of one"),
            ("elsewhere", r"different bases: tensor .* differs"),
            ("empty", "nothing is folded there"),
            ("gone", "no state in"),
        ):
            with pytest.raises(Misconfigured, match=words):
                merge.combine(tmp_path / place)
        assert merge.state.ledger.head.seq == 2
    for name, words in (("opcm", "depends on the order"), ("tsv-m", "keeps of each model what there is room for")):
        alone(tmp_path / f"as-{name}", base, name, tuned[:1])
        with opened(tmp_path / f"as-{name}", base, name) as merge, pytest.raises(Misconfigured, match=words):
            merge.combine(tmp_path / "mean")
