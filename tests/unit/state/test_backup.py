"""A backup is the state as it was at one record, whatever goes on beside it; and a clone is a state of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from continual.errors import Busy, Damaged, Misconfigured
from continual.records import Candidate
from continual.state import State
from continual.state.backup import BackupReport, Wish, backup
from continual.state.entries import CloneEntry, RefuseEntry
from continual.state.inbox import Inbox, PushRecord, load_cursor, name_of, save_cursor
from continual.state.opening import PARTIAL
from continual.state.strays import strays
from continual.state.verify import verify
from tests.helpers import stores
from tests.helpers.trace import at_event

COPY = Wish(copy=True)


def made(state: Path, directory: Path, wish: Wish | None = None) -> BackupReport:
    return backup(state, directory, wish or Wish(), lambda _what, _done, _total: None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    stores.history(tmp_path / "state")
    return tmp_path / "state"


def clean(path: Path) -> State:
    """The state in `path`, which verifies clean and has no strays."""
    with State.open(path) as found:
        assert (verify(found), strays(path, found.format, found.ledger)) == ([], [])
        return found


def same(one: Path, other: Path) -> None:
    """Both are at one record, with the same generations."""
    a, b = clean(one), clean(other)
    assert (a.id, [c.crc for c in a.ledger.log]) == (b.id, [c.crc for c in b.ledger.log])
    assert (a.generations(), a.ledger.tags) == (b.generations(), b.ledger.tags)


@pytest.mark.parametrize("wish", [Wish(), COPY], ids=["linked", "copied"])
def test_it_is_the_state_and_goes_on_with_it(state: Path, tmp_path: Path, wish: Wish) -> None:
    first = made(state, tmp_path / "b", wish)
    same(state, tmp_path / "b")
    assert (first.head, first.records, len(first.generations), first.checked) == (6, 7, 3, True)
    with State.open(state, write=True) as found:
        stores.fold(found, 4)
        found.tag("first", 7, force=True)
        assert len(found.expire(1)) == 3
    second = made(state, tmp_path / "b", wish)
    same(state, tmp_path / "b")
    assert (second.head, second.records, len(second.generations), len(second.dropped)) == (8, 2, 1, 3)
    third = made(state, tmp_path / "b", wish)
    assert (third.records, third.generations, third.linked, third.copied) == (0, (), 0, 0)


def test_hard_links_are_shared_and_copies_are_not(state: Path, tmp_path: Path) -> None:
    linked, copied = made(state, tmp_path / "l"), made(state, tmp_path / "c", COPY)
    assert linked.linked > 40
    assert copied.linked == 0
    shared = {f for f in files(state) if (tmp_path / "l" / f).exists() and (state / f).samefile(tmp_path / "l" / f)}
    assert len(shared) == linked.linked
    assert {f.parts[0] for f in shared} == {"commits", "generations"}
    assert not any(f.name == "receipts.json" for f in shared), "readers of one must not hold up the other"
    assert not any((state / f).samefile(tmp_path / "c" / f) for f in files(state) if (tmp_path / "c" / f).exists())
    with pytest.raises(Misconfigured, match="was made with hard links: copies need a directory of their own"):
        made(state, tmp_path / "l", COPY)


def test_a_file_that_generations_share_is_copied_once(state: Path, tmp_path: Path) -> None:
    report = made(state, tmp_path / "b", COPY)
    metadata = [tmp_path / "b/generations" / name / "sum/wide/zarr.json" for name in report.generations]
    assert len({file.stat().st_ino for file in metadata}) == 1
    with State.open(state, write=True) as found:
        name = found.ledger.get(stores.fold(found, 4)).generation
    made(state, tmp_path / "b", COPY)
    assert (tmp_path / f"b/generations/{name}/sum/wide/zarr.json").samefile(metadata[0]), "nor is it later"


def files(path: Path) -> list[Path]:
    return [p.relative_to(path) for p in path.rglob("*") if p.is_file()]


def test_nothing_in_the_state_is_written_into(state: Path, tmp_path: Path) -> None:
    made(state, tmp_path / "b")
    before = {f: (tmp_path / "b" / f).read_bytes() for f in files(tmp_path / "b")}
    with State.open(state, write=True) as found:
        for number in (4, 5):
            stores.fold(found, number)
        found.tag("first", 2, force=True)
        found.rollback(7)
        found.expire(1)
        save_cursor(state, "hub", {"asked": "y"})
    assert {f: (tmp_path / "b" / f).read_bytes() for f in before} == before
    with State.open(tmp_path / "b", write=True) as copy:
        stores.fold(copy, 6)
        copy.expire(1)
    clean(state)


def test_pushes_and_cursors_go_along(state: Path, tmp_path: Path) -> None:
    inbox, push = Inbox(state), PushRecord("org/a", "0" * 40, 1.0)
    name = name_of("org/a", "0" * 40)
    inbox.put(name, push)
    save_cursor(state, "hub", {"asked": "x"})
    made(state, tmp_path / "b")
    assert Inbox(tmp_path / "b").items() == {name: push}
    assert load_cursor(tmp_path / "b", "hub") == {"asked": "x"}
    inbox.remove(name)
    save_cursor(state, "hub", {"asked": "y"})
    made(state, tmp_path / "b")
    assert Inbox(tmp_path / "b").items() == {}
    assert load_cursor(tmp_path / "b", "hub") == {"asked": "y"}
    clone = made(state, tmp_path / "c", Wish(clone=True))
    assert load_cursor(clone.directory, "hub") is None


def test_a_cursor_is_never_ahead_of_the_records(state: Path, tmp_path: Path) -> None:
    """What the cursor has passed and no record has would never be looked at again."""
    save_cursor(state, "hub", {"asked": "before"})

    def go_on() -> None:
        with State.open(state, write=True) as found:
            stores.fold(found, 4)
        save_cursor(state, "hub", {"asked": "after"})

    with at_event("os.mkdir", tmp_path / "b", go_on) as done:
        assert made(state, tmp_path / "b").head == 6
    assert done
    assert load_cursor(tmp_path / "b", "hub") == {"asked": "before"}


@pytest.mark.parametrize("keep", [1, 3])
def test_a_writer_goes_on_meanwhile(state: Path, tmp_path: Path, keep: int) -> None:
    """Even where the generation that was in force expires before it is copied."""
    writer = State.open(state, write=True)

    def go_on() -> None:
        for number in (4, 5):
            stores.fold(writer, number)
        writer.expire(keep)

    with at_event("os.mkdir", tmp_path / "b", go_on) as done:
        report = made(state, tmp_path / "b")
    assert done
    writer.close()
    found = clean(tmp_path / "b")
    assert report.head == found.ledger.head.seq in (6, 8)
    assert found.ledger.head.generation in found.generations()
    made(state, tmp_path / "b")
    same(state, tmp_path / "b")


def test_what_is_dry_writes_nothing(state: Path, tmp_path: Path) -> None:
    report = made(state, tmp_path / "b", Wish(dry_run=True))
    assert (report.records, len(report.generations), report.checked) == (7, 3, False)
    assert report.nbytes > 10_000
    assert not (tmp_path / "b").exists()


def test_what_else_is_there_is_left_alone(state: Path, tmp_path: Path) -> None:
    stores.history(tmp_path / "other")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat").write_text("cat")
    (tmp_path / "file").write_text("")
    said = {
        "other": "holds another state",
        "photos": "is not empty, and no backup",
        "file": "is no directory",
        "state/inside": "lies in the state",
        "state": "is the state: a backup needs",
    }
    for name, message in said.items():
        with pytest.raises(Misconfigured, match=message):
            made(state, tmp_path / name)
    with State.open(tmp_path / "other", write=True), pytest.raises(Misconfigured):
        made(state, tmp_path / "other")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["cat"]


def test_a_history_that_went_another_way_is_not_written_over(state: Path, tmp_path: Path) -> None:
    made(state, tmp_path / "b", COPY)
    shutil.copytree(tmp_path / "b", tmp_path / "restored")
    with State.open(state, write=True) as found:
        stores.fold(found, 4)
    made(state, tmp_path / "b", COPY)
    for records in (0, 1, 2):
        with pytest.raises(Misconfigured, match="is at record 7 of another history"):
            made(tmp_path / "restored", tmp_path / "b", COPY)
        with State.open(tmp_path / "restored", write=True) as found:
            stores.fold(found, 5 + records)
    same(state, tmp_path / "b")


def test_one_backup_at_a_time(state: Path, tmp_path: Path) -> None:
    made(state, tmp_path / "b")
    with State.open(tmp_path / "b", write=True), pytest.raises(Busy):
        made(state, tmp_path / "b")


@pytest.mark.parametrize("new", [True, False], ids=["the first", "a later one"])
def test_damage_does_not_get_into_a_backup(state: Path, tmp_path: Path, new: bool) -> None:
    if not new:
        made(state, tmp_path / "b", COPY)
    with State.open(state, write=True) as found:
        name = found.ledger.get(stores.fold(found, 4)).generation
    chunk = state / f"generations/{name}/sum/wide/c.0.0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(Damaged, match="wide"):
        made(state, tmp_path / "b", COPY)
    if new:
        with pytest.raises(Misconfigured, match="a backup that was not completed"):
            State.open(tmp_path / "b")
        return
    with State.open(tmp_path / "b") as copy:
        assert (copy.ledger.head.seq, verify(copy)) == (6, [])
    data[7] ^= 1
    chunk.write_bytes(data)
    made(state, tmp_path / "b", COPY)
    same(state, tmp_path / "b")


def test_a_generation_of_the_backup_that_has_rotted_is_copied_again(state: Path, tmp_path: Path) -> None:
    report = made(state, tmp_path / "b", COPY)
    for name in report.generations:
        (tmp_path / f"b/generations/{name}/sum/wide/c.0.0").write_bytes(b"rot")
    made(state, tmp_path / "b", COPY)
    same(state, tmp_path / "b")


def test_who_opens_a_backup_that_was_killed_sees_what_it_was(state: Path, tmp_path: Path) -> None:
    made(state, tmp_path / "b", COPY)
    with State.open(state, write=True) as found:
        for number in (4, 5):
            stores.fold(found, number)
        found.expire(1)
    for name in ("00000007.json", "00000008.json"):  # records without their generations, as a kill leaves them
        shutil.copyfile(state / "commits" / name, tmp_path / "b/commits" / name)
    shutil.copyfile(tmp_path / "b/HEAD", tmp_path / "b" / PARTIAL)
    with State.open(tmp_path / "b") as reader:
        assert (reader.ledger.head.seq, verify(reader)) == (6, [])
    shutil.copytree(tmp_path / "b", tmp_path / "restored")
    with State.open(tmp_path / "restored", write=True) as writer:
        stores.fold(writer, 9)
    assert clean(tmp_path / "restored").ledger.head.seq == 7
    made(state, tmp_path / "b", COPY)
    same(state, tmp_path / "b")


def test_a_clone_is_a_state_of_its_own(state: Path, tmp_path: Path) -> None:
    report = made(state, tmp_path / "c", Wish(clone=True))
    old, new = clean(state), clean(tmp_path / "c")
    assert report.id == new.id != old.id
    assert (new.ledger.cloned, old.ledger.cloned) == ((old.id,), ())
    entry = new.ledger.head.of_kind(CloneEntry)
    assert (entry.id, entry.of, report.head) == (new.id, old.id, 7)
    assert new.ledger.head.generation == old.ledger.head.generation
    for path in (state, tmp_path / "c"):
        with State.open(path, write=True) as found:
            stores.fold(found, 4)
        clean(path)
    with pytest.raises(Misconfigured, match="is a state already: a clone needs a directory of its own"):
        made(state, tmp_path / "c", Wish(clone=True))
    with pytest.raises(Misconfigured, match="of another history"):
        made(state, tmp_path / "c")
    again = made(tmp_path / "c", tmp_path / "d", Wish(clone=True))
    assert clean(again.directory).ledger.cloned == (old.id, new.id)


def test_a_clone_of_a_state_without_models_shares_none(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        refused = Candidate("bad", "bad", "test", "/bad", "full", 1)
        state.record(RefuseEntry(candidate=refused, reason="shape"))
    made(tmp_path / "s", tmp_path / "c", Wish(clone=True))
    assert clean(tmp_path / "c").ledger.cloned == ()


def test_a_rolled_back_clone_shares_what_it_had(state: Path, tmp_path: Path) -> None:
    made(state, tmp_path / "c", Wish(clone=True))
    with State.open(tmp_path / "c", write=True) as found:
        stores.fold(found, 4)
        found.rollback(1)
    assert clean(tmp_path / "c").ledger.cloned == (clean(state).id,)


def test_a_file_system_without_links_gets_copies(state: Path, tmp_path: Path) -> None:
    here = tmp_path.stat().st_dev
    others = [p for p in ("/tmp", "/dev/shm", "/var/tmp") if os.access(p, os.W_OK) and os.stat(p).st_dev != here]
    if not others:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=others[0]) as place:
        report = made(state, Path(place) / "s")
        assert (report.linked, report.copied > 40) == (0, True)
        same(state, Path(place) / "s")
