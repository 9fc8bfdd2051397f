"""Each kind of damage: what a repair says of it, and what is left then. What must hold whatever is damaged is in
tests/property/test_repair.py."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from continual.errors import Busy, Damaged, Misconfigured
from continual.state import State
from continual.state.damage import RepairPlan
from continual.state.entries import RepairEntry
from continual.state.inbox import save_cursor
from continual.state.ledger import kept_out
from continual.state.repair import look, repair
from continual.state.strays import strays
from continual.state.verify import verify
from tests.helpers import stores

HISTORY = 6
"""The newest record of the state below: 1 and 2 folds, 3 a refusal, 4 a tag of 1, 5 a fold, 6 a rollback to 2."""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    stores.history(tmp_path / "state")
    return tmp_path / "state"


def seen(path: Path) -> RepairPlan:
    return look(path, lambda _done, _total: None)


def mended(path: Path) -> RepairEntry:
    """What the record of a repair says; the state verifies clean afterwards and can be written."""
    commit = repair(path, seen(path), lambda _done, _total: None)
    assert commit is not None
    entry = commit.of_kind(RepairEntry)
    with State.open(path, write=True) as found:
        assert found.ledger.head == commit
        assert verify(found) == []
        kept = strays(path, found.format, found.ledger)
        assert entry.aside in [stray.path for stray in kept]
        assert all("repair" in stray.what for stray in kept)
        assert re.fullmatch(r"\.repaired-\d{8}T\d{6}Z(-\d+)?", entry.aside)
    assert seen(path).findings == ()
    return entry


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.unlink()  # a chunk that did not change is a hard link
    file.write_bytes(data)


def generation(path: Path, seq: int) -> str:
    with State.open(path) as found:
        return str(found.ledger.get(seq).generation)


@pytest.mark.parametrize("part", ["commits/00000001.json", "HEAD", "sum"])
def test_what_may_not_be_read_is_no_damage(state: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    denied = state / part if part != "sum" else state / "generations" / generation(state, 1) / part
    assert denied.exists()
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file) != denied and access(file, mode))
    with pytest.raises(Misconfigured, match="permission denied"):
        seen(state)


def test_nothing_is_damaged(state: Path) -> None:
    plan = seen(state)
    assert plan == RepairPlan((), HISTORY, HISTORY)
    before = sorted(state.rglob("*"))
    assert repair(state, plan, lambda _done, _total: None) is None
    assert sorted(state.rglob("*")) == before


HEADS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "flipped": flip,
    "empty": lambda file: file.write_bytes(b""),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("harm", HEADS)
def test_a_head_that_cannot_be_read_loses_nothing_that_is_there(state: Path, harm: str) -> None:
    HEADS[harm](state / "HEAD")
    plan = seen(state)
    assert (plan.last, plan.to, plan.aside) == (HISTORY, HISTORY, ("HEAD",) if harm == "a directory" else ())
    assert plan.lost == (f"HEAD: whether there were records after {HISTORY} cannot be known",)
    old = (state / "HEAD").read_bytes() if (state / "HEAD").is_file() else None
    entry = mended(state)
    aside = state / entry.aside / "HEAD"
    assert (aside.read_bytes() if aside.is_file() else None) == old
    assert aside.exists() or harm == "missing"
    with State.open(state) as found:
        assert [c.seq for c in found.ledger.folds()] == [1, 2]


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_record_in_the_middle(state: Path, harm: Callable[[Path], object]) -> None:
    name = generation(state, 5)
    harm(state / "commits/00000002.json")
    plan = seen(state)
    assert (plan.last, plan.to, plan.undone, plan.tags) == (1, 1, (), ())
    first = "is missing" if harm is Path.unlink else "cannot be read"
    assert plan.lost == (
        f"record 2: {first}",
        "record 3: refuse of bad (shape)",
        "record 4: tag first",
        "record 5: fold of n3",
        "record 6: rollback: back to record 2",
    )
    assert {"commits/00000003.json", f"generations/{name}", "tags/first.json"} <= set(plan.aside)
    entry = mended(state)
    assert (entry.to, entry.undone, entry.lost) == (1, 0, plan.lost)
    for path in plan.aside:
        assert (state / entry.aside / path).exists()
        assert not (state / path).exists() or path == "commits/00000002.json", "whose number the repair has"
    with State.open(state) as found:
        assert found.ledger.tags == {}
        assert not found.ledger.is_settled("k2"), "it is folded again when it is seen again"
        np.testing.assert_array_equal(found.read("wide", "sum"), stores.value("wide", 1))


def test_the_newest_records_are_missing(state: Path) -> None:
    for seq in (5, 6):
        (state / f"commits/{seq:08d}.json").unlink()
    plan = seen(state)
    assert (plan.last, plan.to, plan.lost) == (4, 4, ("record 5: is missing", "record 6: is missing"))
    mended(state)


def test_the_generation_in_force(state: Path) -> None:
    name = generation(state, 6)
    flip(state / f"generations/{name}/sum/wide/c.0.0")
    plan = seen(state)
    assert (plan.last, plan.to) == (HISTORY, 5)
    assert (plan.lost, plan.generations, plan.aside) == ((), (name,), (f"generations/{name}",))
    assert plan.again == ("record 5: n3",)
    mended(state)
    with State.open(state) as found:
        np.testing.assert_array_equal(found.read("wide", "sum"), stores.value("wide", 3))
        assert found.ledger.totals.count == 3
        assert [c.seq for c in found.ledger.refusals] == [3], "no record is lost"


def test_folds_that_are_undone_can_be_retried(state: Path) -> None:
    names = [generation(state, seq) for seq in (2, 5)]
    for name in names:
        (state / f"generations/{name}/receipts.json").unlink()
    plan = seen(state)
    assert (plan.last, plan.to, plan.undone, plan.lost) == (HISTORY, 1, ("record 2: n2",), ())
    mended(state)
    with State.open(state) as found:
        fate = found.ledger.fate("k2")
        assert fate is not None
        assert fate.entry.fate == "rolled-back"
        assert kept_out(found.ledger, "n2") == [fate]


def test_all_generations_are_gone(state: Path) -> None:
    shutil.rmtree(state / "generations")
    plan = seen(state)
    assert (plan.last, plan.to, plan.tags) == (HISTORY, 0, ("first",))
    assert plan.undone == ("record 1: n1", "record 2: n2")
    entry = mended(state)
    assert (entry.tags, entry.undone) == (("first",), 2)
    with State.open(state) as found:
        assert (found.ledger.tags, found.ledger.head.generation) == ({}, None)
        assert not found.read("wide", "sum").any()


def test_old_generations_are_gone_and_the_newest_is_whole(state: Path) -> None:
    name = generation(state, 5)
    shutil.rmtree(state / "generations" / name)
    assert seen(state) == RepairPlan((), HISTORY, HISTORY), "it might have expired"
    (state / f"generations/{generation(state, 1)}/sum/zarr.json").write_bytes(b"{}")
    plan = seen(state)
    assert (plan.to, plan.lost, plan.undone, plan.tags) == (HISTORY, (), (), ("first",))
    mended(state)


@pytest.mark.parametrize("text", [None, b"", b"nonsense"])
def test_the_file_of_a_tag(state: Path, text: bytes | None) -> None:
    with State.open(state, write=True) as found:
        stores.fold(found, 4)
    file = state / "tags/first.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text)
    plan = seen(state)
    assert (plan.tag_files, plan.loses) == (("first",), False)
    mended(state)
    with State.open(state) as found:
        assert found.ledger.tags == {"first": 1}


@pytest.mark.parametrize("name", ["format.json", "commits/00000000.json"])
@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_what_stands_nowhere_else_comes_from_a_backup(
    state: Path, tmp_path: Path, name: str, harm: Callable[[Path], object]
) -> None:
    shutil.copytree(state, tmp_path / "backup")
    harm(state / name)
    before = sorted(state.rglob("*"))
    with pytest.raises(Damaged, match=rf"cannot be repaired: .*{name.split('/')[-1]}.*from (any|a) backup"):
        seen(state)
    assert sorted(state.rglob("*")) == before
    shutil.copyfile(tmp_path / "backup" / name, state / name)
    assert seen(state).findings == ()


def test_the_format_of_another_state(state: Path, tmp_path: Path) -> None:
    stores.history(tmp_path / "other")
    shutil.copyfile(tmp_path / "other/format.json", state / "format.json")
    with pytest.raises(Damaged, match=r"cannot be repaired: .*is not the one that this state was made with"):
        seen(state)


def test_two_chains_are_mixed(state: Path, tmp_path: Path) -> None:
    """Records of a copy that went on by itself lie among those of the state."""
    shutil.copytree(state, tmp_path / "copy")
    for path, number in ((state, 4), (tmp_path / "copy", 5)):
        with State.open(path, write=True) as found:
            stores.fold(found, number)
            stores.fold(found, number + 2)
    shutil.copyfile(tmp_path / "copy/commits/00000007.json", state / "commits/00000007.json")
    plan = seen(state)
    assert (plan.last, plan.to) == (7, 6), "it follows from record 6, and its generation is not here"
    assert plan.lost[0] == "record 8: fold of n6"
    assert plan.undone == ("record 7: n5",)
    mended(state)


def test_head_is_of_another_history(state: Path, tmp_path: Path) -> None:
    shutil.copytree(state, tmp_path / "copy")
    for path, number in ((state, 4), (tmp_path / "copy", 5)):
        with State.open(path, write=True) as found:
            stores.fold(found, number)
    shutil.copyfile(tmp_path / "copy/HEAD", state / "HEAD")
    plan = seen(state)
    assert (plan.last, plan.to) == (7, 7)
    assert "which HEAD names: it is not there" in plan.lost[0]
    mended(state)


def test_a_state_that_was_copied_half(state: Path, tmp_path: Path) -> None:
    newest = generation(state, 2)
    half = tmp_path / "half"
    shutil.copytree(state, half, ignore=lambda _directory, names: {newest, "tags", "leases"} & set(names))
    plan = seen(half)
    assert (plan.last, plan.to, plan.again) == (HISTORY, 5, ("record 5: n3",))
    mended(half)


def test_records_above_head_that_lack_their_generations_count_as_far_as_they_are_whole(
    state: Path, tmp_path: Path
) -> None:
    """What a copy is that was made file by file while a daemon went on."""
    shutil.copyfile(state / "HEAD", tmp_path / "HEAD")
    with State.open(state, write=True) as found:
        for number in (4, 5, 6):
            stores.fold(found, number)
        found.expire(1)
    shutil.copyfile(tmp_path / "HEAD", state / "HEAD")
    with pytest.raises(Damaged):
        State.open(state)
    plan = seen(state)
    assert (plan.last, plan.to, plan.loses) == (9, 9, False)
    mended(state)


def test_a_lock_that_was_left_keeps_nobody_out_and_one_that_is_held_does(state: Path) -> None:
    (state / "lock").write_bytes(b"a process that is long gone")
    flip(state / "HEAD")
    mended(state)
    with State.open(state, write=True):
        for look_again in (seen, mended):
            with pytest.raises(Busy):
                look_again(state)


def test_a_cursor_that_cannot_be_read(state: Path) -> None:
    save_cursor(state, "hub", {"asked": "x"})
    flip(state / "sources/hub.json")
    plan = seen(state)
    assert plan.lost == ("sources/hub.json: a cursor: its source is asked for everything again",)
    entry = mended(state)
    assert (state / entry.aside / "sources/hub.json").exists()


def test_what_is_no_record_is_moved_aside(state: Path) -> None:
    (state / "commits/notes.txt").write_text("do not touch")
    plan = seen(state)
    assert (plan.aside, plan.loses) == (("commits/notes.txt",), False)
    entry = mended(state)
    assert (state / entry.aside / "commits/notes.txt").read_text() == "do not touch"


def test_a_plan_that_is_not_true_any_more_is_not_followed(state: Path) -> None:
    flip(state / "commits/00000005.json")
    plan = seen(state)
    flip(state / "commits/00000004.json")
    before = sorted(state.rglob("*"))
    with pytest.raises(Misconfigured, match="is not as it was when you were told"):
        repair(state, plan, lambda _done, _total: None)
    assert sorted(state.rglob("*")) == before


def test_a_second_damage_is_a_second_repair(state: Path) -> None:
    flip(state / "commits/00000006.json")
    first = mended(state)
    with State.open(state, write=True) as found:
        stores.fold(found, 7)
    flip(state / "commits/00000007.json")
    second = mended(state)
    assert first.aside != second.aside
    assert second.lost == ("record 7: cannot be read",)


def test_where_there_is_no_state(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(Misconfigured, match="no state in"):
            seen(path)
