"""What becomes of the members of a round that are not folded, and of candidates that change, vanish or come again."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from continual import api
from continual.errors import Misconfigured, Retry
from continual.state.verify import verify
from tests.helpers import models, quadratic
from tests.helpers.pools import QUERY, Stopped, bits, fill, names, opened, rows, waits

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


def test_patience_then_refused_and_looked_at_again_on_retry(tmp_path: Path, base: Path) -> None:
    noise = quadratic.noise(base, 0)
    with opened(tmp_path / "state", base, rounds={"patience": 2}) as merge:
        fill(merge, quadratic.good(base, 0), noise)
        assert rows(merge.round())["noise0"].fate == "deferred"
        assert merge.fold(noise).reason == "waiting"
        found = merge.round()
        assert (rows(found)["noise0"].fate, rows(found)["noise0"].reason, found.refused) == (
            "refused",
            "irrelevant",
            True,
        )
        assert merge.pool() == {}
        told = merge.fold(noise)
        assert (told.fate, told.refused, "irrelevant in 2 rounds" in told.message) == ("known", True, True)
        why = merge.why("noise0")
        assert (why.fate, why.reason, [r.row.fate for r in why.rounds]) == (
            "refused",
            "irrelevant",
            ["deferred", "refused"],
        )
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
        settled = merge.state.ledger.fate(old)
        assert settled is not None
        assert settled.entry.fate == "expired"


def test_a_folder_that_cannot_be_reached_settles_nothing(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.noise(base, 0))
        (base.parent / "pool").rename(base.parent / "away")
        with pytest.raises(Retry, match=r"cannot be reached; nothing was settled"):
            merge.round()
        assert sorted(waits(merge)) == ["good0", "noise0"]
        assert merge.state.ledger.open_round is not None
        (base.parent / "away").rename(base.parent / "pool")
        assert rows(merge.round())["good0"].fate == "folded"
        assert [c.entry.kind for c in merge.state.ledger.log].count("round") == 1


@pytest.mark.parametrize("stage", ["score", "trial", "line search", "gradient"])
@pytest.mark.parametrize("rule", ["mean", "frank-wolfe"])
def test_a_member_that_vanishes_in_the_middle_is_tried_again_without_it(
    tmp_path: Path, base: Path, stage: str, rule: str
) -> None:
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
        assert verify(merge.state) == []


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
        assert (merge.why("good0").fate, merge.why("good0").reason) == ("expired", "gone")
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
        fill(
            merge, quadratic.noise(base, 3), quadratic.noise(base, 1), quadratic.good(base, 1), quadratic.noise(base, 2)
        )
        found = rows(merge.round())
        assert {n: r.fate for n, r in found.items()} == {
            "noise3": "expired",
            "noise1": "deferred",
            "noise2": "deferred",
            "good1": "folded",
        }
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


def test_what_a_round_refused_by_a_setting_waits_again_under_another_value(tmp_path: Path, base: Path) -> None:
    good = quadratic.good(base, 0)
    with opened(tmp_path / "state", base, max_base_ratio=1e-9) as merge:
        fill(merge, good)
        assert rows(merge.round())["good0"].reason == "norm-base"
        told = merge.fold(good)
        assert told.fate == "known"
        assert "another max_base_ratio or gates.norms.act looks at it again" in told.line()
    with opened(tmp_path / "state", base) as merge:
        assert merge.fold(good).fate == "deferred"
        assert merge.why("good0").fate == "deferred"
        assert rows(merge.round())["good0"].fate == "folded"


def test_the_ledger_alone_gives_back_pool_fates_and_history(tmp_path: Path, base: Path) -> None:
    state = tmp_path / "state"

    def told(merge: api.Merge) -> Any:
        pool = {k: (w.commit.seq, w.since, w.rounds, w.last) for k, w in merge.pool().items()}
        keys = {c.entry.candidate.key for c in merge.state.ledger.log if c.entry.candidate}
        fates = {
            k: (f.seq, f.entry.fate, f.entry.reason, f.entry.message)
            if k and (f := merge.state.ledger.fate(k))
            else None
            for k in keys
        }
        return (
            list(pool.items()),
            fates,
            names(merge),
            merge.state.ledger.totals,
            bits(merge),
            merge.state.ledger.open_round,
        )

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
        back, before = merge.state.ledger.head.seq, bits(merge)
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
        assert [(r.members, r.row.judged) for r in told.rounds] == [(2, 1), (2, 1)]
        assert (told.rounds[0].row.score, told.rounds[0].row.z) == (found["noise0"].score, found["noise0"].z)
        assert all(r.objective.startswith("blake3:") for r in told.rounds)
        folded = merge.why("good0")
        assert (folded.fate, folded.message) == (
            "folded",
            f"good0: folded as record {merge.state.ledger.folds()[0].seq}",
        )


def test_adding_a_state_takes_what_it_brings_out_of_the_pool(tmp_path: Path, base: Path) -> None:
    good = quadratic.good(base, 0)
    with opened(tmp_path / "other", base, select="none") as merge:
        merge.fold(good)
    with opened(tmp_path / "state", base) as merge:
        fill(merge, good, quadratic.noise(base, 0))
        merge.combine(tmp_path / "other")
        assert (names(merge), waits(merge)) == (["good0"], ["noise0"])
