"""A state on an object store: what it says, who may write, and what is made of answers that do not come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from continual.errors import Busy, ContinualError, Damaged, Halt, Misconfigured
from continual.state import State, bucket, excerpts, heartbeat, lock, retention, storing
from continual.state.backup import Wish, backup
from continual.state.repair import look, repair
from continual.state.strays import strays
from continual.state.verify import verify
from continual.stores import ObjectPath, Where, where
from tests.helpers import object_stores, stores
from tests.helpers.cutting import Cutting, Fault, cutting

pytestmark = pytest.mark.slow


@pytest.fixture
def at(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    return object_stores.state_at(moto, f"state/{tmp_path.name}", monkeypatch)


@pytest.fixture
def proxy(moto: str) -> Iterator[Cutting]:
    with cutting(moto) as running:
        yield running


def findings(path: Where) -> list[str]:
    try:
        with State.open(path) as opened:
            return verify(opened) + [f"{one.path}: {one.what}" for one in strays(path, opened.format, opened.ledger)]
    except ContinualError as error:
        return [str(error)]


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


def test_a_second_writer_is_kept_out_and_the_first_may_be_followed(at: ObjectPath) -> None:
    short = where(str(at), 3.0)
    with stores.make(short) as state:
        state.set_url("http://127.0.0.1:1")
        with pytest.raises(
            Busy, match=r"is being written by process \d+ on .+ at http://127\.0\.0\.1:1; stop it first"
        ):
            State.open(short, write=True)
        assert lock.holder(short / "lock").url == "http://127.0.0.1:1"
        stores.fold(state, 1)
    assert lock.holder(short / "lock") == (None, None, None)
    with State.open(short, write=True) as state:
        assert stores.fold(state, 2) == 2
    assert [int(name[:-5]) for name in storing.names(short / "lock")] == [2]


def test_one_of_those_who_wait_for_a_dead_writer_follows_it(at: ObjectPath) -> None:
    short = where(str(at), 2.0)
    assert isinstance(short, ObjectPath)
    stores.make(short).close()
    (last,) = storing.names(short / "lock")
    token = (short / "lock" / last).read_bytes().replace(b'"released":true', b'"released":false')
    storing.replace(short / "lock" / last, token)
    opened: list[State] = []
    busy: list[Busy] = []

    def wait() -> None:
        try:
            opened.append(State.open(short, write=True))
        except Busy as error:
            busy.append(error)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(busy)) == (1, 3)
    with opened[0] as state:
        assert stores.fold(state, 1) == 1


def test_who_waits_for_a_lease_that_another_took_is_told_of_that_one(
    at: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has deleted the lease that this one looks at."""
    short = where(str(at), 2.0)
    assert isinstance(short, ObjectPath)
    stores.make(short).close()
    (last,) = storing.names(short / "lock")
    given_back = (short / "lock" / last).read_bytes()
    storing.replace(short / "lock" / last, given_back.replace(b'"released":true', b'"released":false'))

    def sleeps(_seconds: float) -> None:
        storing.replace(short / "lock" / "00000002.json", given_back)
        storing.remove(short / "lock" / last)

    monkeypatch.setattr("continual.state.lock.time.sleep", sleeps)
    with pytest.raises(Busy, match="is being written by another process; wait until it is done"):
        State.open(short, write=True)


def test_a_writer_that_lost_its_lease_commits_nothing(at: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    short = where(str(at), 2.0)
    with stores.make(short) as first:
        stores.fold(first, 1)
        monkeypatch.setattr(heartbeat, "BEATS", 0.001)  # as if it had been stopped
        assert first._lock is not None
        first._lock._beat._stop.set()  # type: ignore[attr-defined]
        begun = first.begin()
        for name in stores.SHAPES:
            begun.write(name, "sum", stores.value(name, 2))
        with State.open(short, write=True) as second:
            with pytest.raises(Halt, match="the lease of this writer ran out, and another process may write by now"):
                first.commit(begun, stores.entry(2))
            assert second.orphans == ()
            assert stores.fold(second, 2) == 2
        with pytest.raises(Halt, match="the lease of this writer ran out"):
            stores.fold(first, 3)
    assert [line for line in findings(short) if "no record names" not in line] == []


def test_a_writer_that_lost_its_lease_deletes_nothing_that_is_in_force_by_now(at: ObjectPath) -> None:
    """The next writer may have gone back to what this one takes for old."""
    short = where(str(at), 2.0)
    with stores.make(short) as first:
        for number in (1, 2, 3):
            stores.fold(first, number)
        assert first._lock is not None
        first._lock._beat._stop.set()  # type: ignore[attr-defined]
        with State.open(short, write=True) as second:
            second.rollback(1)
            with pytest.raises(Halt, match="the lease of this writer ran out"):
                first.expire(1)
            np.testing.assert_array_equal(second.read("wide", "sum"), stores.value("wide", 1))
    assert findings(short) == []


def test_a_writer_that_lost_its_lease_makes_up_for_nothing(at: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    short = where(str(at), 2.0)
    with stores.make(short) as first:
        stores.fold(first, 1)
        with monkeypatch.context() as patch:
            patch.setattr("continual.state.protocol.write_tag", _fails)
            first.tag("best")
        assert first.behind is not None
        assert first._lock is not None
        first._lock._beat._stop.set()  # type: ignore[attr-defined]
        with State.open(short, write=True) as second:
            stores.fold(second, 2)
            second.tag("best", force=True)
            with pytest.raises(Halt, match="the lease of this writer ran out"):
                stores.fold(first, 3)
    assert [line for line in findings(short) if "no record names" not in line] == []


def _fails(*_: object) -> None:
    raise OSError(5, "input/output error", "tags")


def test_who_may_only_read_reads_beside_a_fold(at: ObjectPath, proxy: Cutting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that no record names yet is there then, and somebody's lease: no time is asked for by writing."""
    with stores.make(at) as state:
        for number in (1, 2):
            stores.fold(state, number)
        with state.begin() as begun, state.lease(1):
            begun.write("wide", "sum", stores.value("wide", 3))
            begun._draft._several.wait()
            proxy.decide = lambda method, _path: "" if method in ("GET", "HEAD") else "denied"
            through = object_stores.state_at(proxy.address, at.key, monkeypatch)
            with State.open(through) as read, read.lease():
                np.testing.assert_array_equal(read.read("wide", "sum"), stores.value("wide", 2))
                assert read.orphans == (begun.id,)
                assert retention.expired(through, read.ledger, retention.Keep(1)) == []
            assert proxy.told["denied"] > 0
            with pytest.raises(Misconfigured, match="cannot open the state for writing"):
                State.open(through, write=True)


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


def test_what_a_killed_process_left_of_asking_for_the_time_goes(
    at: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.make(at).close()
    storing.replace(at / f"lock/{heartbeat.PROBE}{'0' * 16}", b"one")
    assert findings(at) == []
    State.open(at, write=True).close()
    assert len(storing.names(at / "lock")) == 2  # it may be of somebody who asks now
    monkeypatch.setattr(heartbeat, "ran_out", lambda *_: True)
    State.open(at, write=True).close()
    assert len(storing.names(at / "lock")) == 1


def test_a_lease_that_the_store_does_not_let_be_written_says_so(
    at: ObjectPath, proxy: Cutting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials ran out, say, while nothing was folded."""
    stores.make(at).close()
    through = where(str(object_stores.state_at(proxy.address, at.key, monkeypatch)), 2.0)
    with State.open(through, write=True) as state:
        lock_ = state._lock
        assert isinstance(lock_, lock.WriterLease)
        proxy.decide = lambda method, _path: "denied" if method == "PUT" else ""
        with pytest.raises(OSError, match="look at the credentials"):
            lock_._beat.beat()
        lock_._beat._until = 0.0
        proxy.decide = lambda _method, _path: ""
        with pytest.raises(Halt, match=r"may write by now: s3://.+look at the credentials.+; nothing was settled"):
            stores.fold(state, 1)


def test_of_two_who_believe_that_they_may_write_one_commits(at: ObjectPath) -> None:
    """The record is the fence: whatever the clocks say."""
    with stores.make(at) as one:
        head = one.ledger.head
        (at / "lock/00000001.json").unlink()
        with State.open(at, write=True) as other:
            assert stores.fold(one, 1) == 1
            with pytest.raises(Halt, match=r"another writer was first; nothing was settled; another process writes to"):
                stores.fold(other, 1)
            with pytest.raises(Halt, match="another writer was first"):
                other.tag("x")
        assert one.ledger.get(1).prev == head.crc
    assert [line for line in findings(at) if "no record names" not in line] == []


@pytest.mark.parametrize("fault", ["cut", "half", "late", "twice", "again", "lost"])
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
