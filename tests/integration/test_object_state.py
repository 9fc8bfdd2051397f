"""A state on an object store: what it says, who may write, and what is made of answers that do not come."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import zarr

from continual.errors import Damaged, Halt, Misconfigured
from continual.state import State, bucket, excerpts, heartbeat, storing
from continual.state.backup import Wish, backup
from continual.state.repair import look, repair
from continual.stores import ObjectPath, where
from tests.helpers import object_stores, stores
from tests.helpers.cutting import Cutting, Fault
from tests.helpers.object_stores import findings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("make", [stores.history, stores.history_of_adapters], ids=["tensors", "adapters"])
def test_it_says_what_one_on_a_disk_says(at: ObjectPath, tmp_path: Path, make: object) -> None:
    assert callable(make)
    for place in (at, tmp_path / "s"):
        make(place)
        assert findings(place) == []
    with State.open(at) as there, State.open(tmp_path / "s") as here:
        assert [c.kind for c in there.ledger.log] == [c.kind for c in here.ledger.log]
        assert there.ledger.tags == here.ledger.tags
        assert len(there.generations()) == len(here.generations())
        for name, slots in here.format.slots.items():
            for slot in slots:
                np.testing.assert_array_equal(there.read(name, slot), here.read(name, slot))
        one, other = there.group(), here.group()
        assert isinstance(one.store, zarr.storage.ObjectStore)
        groups = storing.names(here.path / "generations" / str(here.ledger.head.generation))
        paths = {f"{group}/{name}" for group in groups if "." not in group for name in other.require_group(group)}
        assert len(paths) > 5
        for path in paths:
            np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(other[path]))


def test_whatever_is_hurt_is_found(at: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "SPAN", 3)
    stores.history(at)
    with State.open(at) as opened:
        generation = f"generations/{opened.ledger.head.generation}"
        older = next(f"generations/{name}" for name in opened.generations() if name not in generation)
    files = ("format.json", "HEAD", "commits/00000000.json", "commits/00000003.json", "tags/first.json")
    files += (f"{generation}/receipts.json", f"{older}/receipts.json", f"{generation}/sum/zarr.json")
    files += (f"{older}/sum/wide/zarr.json", f"{generation}/sum/wide/c.0.0")
    for file in files:
        whole = (at / file).read_bytes()
        for harm in (b"x" + whole[1:], b"", None):
            if harm is None:
                (at / file).unlink()
            else:
                storing.replace(at / file, harm)
            told = findings(at)
            assert told, (file, harm)
            assert all("Error" not in line for line in told), told
        storing.replace(at / file, whole)
    assert findings(at) == []


def test_a_state_that_was_copied_file_by_file_is_one(at: ObjectPath, tmp_path: Path) -> None:
    """As by `aws s3 sync`, either way."""
    stores.history(tmp_path / "disk")
    for file in storing.sizes(tmp_path / "disk"):
        storing.replace(at / file, (tmp_path / "disk" / file).read_bytes())
    with State.open(at, write=True) as state:
        assert stores.fold(state, 7) == len(state.ledger.log) - 1
    assert findings(at) == []
    for file in storing.sizes(at):
        (tmp_path / "again" / file).parent.mkdir(parents=True, exist_ok=True)
        storing.replace(tmp_path / "again" / file, (at / file).read_bytes())
    with pytest.raises(Misconfigured, match="lock is a directory, as of a state on an object store"):
        State.open(tmp_path / "again", write=True)
    storing.remove_tree(tmp_path / "again/lock")
    with State.open(tmp_path / "again", write=True) as state:
        np.testing.assert_array_equal(state.read("wide", "sum"), stores.value("wide", 7))


@pytest.mark.parametrize("fault", ["cut", "half", "late", "twice", "again", "lost", "failed", "busy"])
def test_an_answer_that_is_lost_loses_and_doubles_nothing(at: ObjectPath, proxy: Cutting, fault: Fault) -> None:
    stores.make(at).close()
    met: list[str] = []
    records: list[str] = []

    def decide(method: str, path: str) -> Fault:
        met.append(path)
        if method == "PUT" and "/commits/" in path:
            records.append(path)
            return fault if len(records) % 2 else ""
        return fault if fault != "again" and len(met) % 17 == 0 else ""

    proxy.decide, proxy.late = decide, 0.02
    with pytest.MonkeyPatch.context() as patch:
        through = object_stores.state_at(proxy.address, at.key, patch)
        with State.open(through, write=True) as state:
            for number in range(1, 9):
                assert stores.fold(state, number) == number
    assert proxy.told[fault] > 2
    assert findings(at) == []
    with State.open(at) as state:
        assert len(state.ledger.folds()) == 8


def test_where_nobody_says_whether_a_record_stands_the_writer_stops(
    at: ObjectPath, proxy: Cutting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_PATIENCE", (0.01, 0.01))
    stores.make(at).close()
    dead = threading.Event()

    def decide(method: str, path: str) -> Fault:
        if method == "PUT" and "/commits/" in path:
            dead.set()
        return "cut" if dead.is_set() else ""

    proxy.decide = decide
    with pytest.MonkeyPatch.context() as patch:
        through = object_stores.state_at(proxy.address, at.key, patch)
        state = State.open(through, write=True)
        with pytest.raises(Halt, match="does not say whether it did: start again once the store answers"):
            stores.fold(state, 1)
        with pytest.raises(Halt, match="start again once the store answers"):
            state.tag("x")
        dead.clear()
        proxy.decide = lambda _method, _path: ""
        state.close()
    with State.open(at, write=True) as again:  # it stands, and what it names was kept
        assert again.adopted == (1,)
        assert len(again.ledger.folds()) == 1
    assert findings(at) == []


def test_a_store_that_overwrites_what_it_is_asked_to_create_is_refused(at: ObjectPath, proxy: Cutting) -> None:
    proxy.decide = lambda _method, _path: "unconditional"
    with pytest.MonkeyPatch.context() as patch:
        through = object_stores.state_at(proxy.address, at.key, patch)
        with pytest.raises(Misconfigured, match="this store overwrites what it is asked to create"):
            stores.make(through)
    assert storing.names(at) == []


def test_a_lagging_head_is_a_hint(at: ObjectPath) -> None:
    with stores.make(at) as state:
        stores.fold(state, 1)
        before = (at / "HEAD").read_bytes()
        for number in (2, 3):
            stores.fold(state, number)
    storing.replace(at / "HEAD", before)
    with State.open(at) as read:
        assert (read.ledger.head.seq, read.acknowledged) == (3, 1)
    with State.open(at, write=True) as state:
        assert state.adopted == (2, 3)
    assert findings(at) == []
    (at / "commits/00000003.json").unlink()
    with pytest.raises(Damaged, match="records are missing"):
        State.open(at)


def test_what_a_reader_reads_does_not_expire(at: ObjectPath) -> None:
    short = where(str(at), 2.0)
    with stores.make(short) as state:
        for number in (1, 2, 3):
            stores.fold(state, number)
        with State.open(short) as reader:
            with reader.lease(1):
                assert len(state.expire(1)) == 1
                np.testing.assert_array_equal(reader.read("wide", "sum", 1), stores.value("wide", 1))
            assert len(state.expire(1)) == 1
            with pytest.raises(Misconfigured, match="has expired"), reader.lease(1):
                pass
        assert state.generations() == [state.ledger.head.generation]
        assert [name for name in storing.names(short / "generations") if name.startswith(".")] == []
    assert findings(short) == []


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The store's clock is so much further."""
    now = heartbeat.now
    monkeypatch.setattr(heartbeat, "now", lambda path: now(path) + timedelta(seconds=seconds))


@pytest.mark.parametrize(("said", "over"), [(None, 62.0), (b"", 4.0), (b'x\n{"seconds":Infinity}', 4.0)])
def test_a_reader_has_what_it_reads_for_as_long_as_it_says(
    at: ObjectPath, monkeypatch: pytest.MonkeyPatch, said: bytes | None, over: float
) -> None:
    """The daemon that expires it may have another setting; of an earlier version, or of damage, it has the daemon's."""
    with stores.make(where(str(at), 2.0)) as state:
        stores.fold(state, 1)
        with State.open(at) as reader, reader.lease(1):
            if said is not None:
                (name,) = storing.names(at / "leases")
                storing.replace(at / "leases" / name, said)
            stores.fold(state, 2)
            later(monkeypatch, over - 3.0)
            assert state.expire(1) == []
            later(monkeypatch, 4.0)
            assert len(state.expire(1)) == 1


def test_what_a_dead_writer_with_a_short_lease_left_stays_until_its_requests_have_ended(
    at: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = where(str(at), 2.0)
    with stores.make(short) as state:
        transaction = state.begin()
        transaction.write("wide", "sum", stores.value("wide", 1))
        transaction._draft._several.wait()
        left = transaction.id
        transaction.committed()
    later(monkeypatch, 170.0)
    with State.open(short, write=True) as state:
        assert state.orphans == ()
    later(monkeypatch, 20.0)
    with State.open(short, write=True) as state:
        assert state.orphans == (left,)


def test_what_a_dead_writer_left_goes_once_nothing_comes_of_it_any_more(
    at: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stores.make(at) as state:
        transaction = state.begin()
        transaction.write("wide", "sum", stores.value("wide", 1))
        transaction._draft._several.wait()
        left = transaction.id
        stores.fold(state, 1)
        transaction.committed()
    with State.open(at, write=True) as state:
        assert state.orphans == ()
    assert left in storing.names(at / "generations")
    monkeypatch.setattr(heartbeat, "ran_out", lambda *_: True)
    with State.open(at, write=True) as state:
        assert state.orphans == (left,)
    assert storing.names(at / "generations") == state.generations()
    assert findings(at) == []


def test_a_killed_expiry_is_ended(at: ObjectPath) -> None:
    with stores.make(at) as state:
        for number in (1, 2):
            stores.fold(state, number)
        first = str(state.ledger.get(1).generation)
    generations = at / "generations"
    storing.rename(generations / first / "receipts.json", generations / f".expired-{first}" / "receipts.json")
    assert [line for line in findings(at) if "being written" not in line and "WRITING" not in line] == []
    with State.open(at, write=True) as state:
        assert state.generations() == [state.ledger.head.generation]
    assert len(storing.names(generations)) == 1
    assert findings(at) == []


def test_a_backup_goes_from_and_to_a_store(at: ObjectPath, tmp_path: Path) -> None:
    stores.history(at / "s")
    quiet = lambda _what, _done, _all: None  # noqa: E731
    for source, target in ((at / "s", tmp_path / "disk"), (tmp_path / "disk", at / "t"), (at / "s", at / "u")):
        report = backup(source, target, Wish(), quiet)
        assert (report.linked, report.checked) == (0, True)
        assert findings(target) == []
        assert backup(source, target, Wish(), quiet).copied == 0
    with State.open(at / "s", write=True) as state:
        stores.fold(state, 5)
    assert backup(at / "s", tmp_path / "disk", Wish(), quiet).generations
    with State.open(tmp_path / "disk") as copy:
        np.testing.assert_array_equal(copy.read("wide", "sum"), stores.value("wide", 5))
    clone = backup(at / "s", at / "c", Wish(clone=True), quiet)
    with State.open(at / "c") as copy:
        assert copy.id == clone.id != copy.format.id
    with pytest.raises(Misconfigured, match="lies in the state"):
        backup(at / "s", at / "s/copy", Wish(), quiet)


def test_what_a_killed_backup_left_half_on_a_store_is_taken_again(at: ObjectPath, tmp_path: Path) -> None:
    """Nothing has another name there until it is whole; nobody reads what was copied, so that nobody else finds it."""
    stores.history(tmp_path / "disk")
    quiet = lambda _what, _done, _all: None  # noqa: E731
    backup(tmp_path / "disk", at, Wish(check=False), quiet)
    with State.open(tmp_path / "disk") as state:
        for name in state.generations():
            for file in ("sum/wide/c.0.0", "receipts.json"):
                storing.remove(at / "generations" / name / file)
    storing.remove(at / "HEAD")
    storing.replace(at / "backup.json", b"x")
    assert backup(tmp_path / "disk", at, Wish(check=False), quiet).generations
    assert findings(at) == []


def test_a_damaged_one_is_repaired(at: ObjectPath) -> None:
    with stores.make(at) as state:
        for number in (1, 2):
            stores.fold(state, number)
        newest = f"generations/{state.ledger.head.generation}"
    storing.replace(at / newest / "sum/wide/c.0.0", b"x")
    quiet = lambda _done, _all: None  # noqa: E731
    plan = look(at, quiet)
    assert (plan.to, plan.aside) == (1, (newest,))
    commit = repair(at, plan, quiet)
    assert commit is not None
    assert commit.seq == 3
    with State.open(at) as state:
        np.testing.assert_array_equal(state.read("wide", "sum"), stores.value("wide", 1))
    assert [line for line in findings(at) if "a repair kept aside" not in line] == []
