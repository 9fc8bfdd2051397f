"""Who may write to a state on an object store, what a writer does that lost its lease, and who may only read."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from continual.errors import Busy, Halt, Misconfigured, Retry
from continual.state import State, heartbeat, holding, lock, retention, store, storing
from continual.state.bucket_holds import WriterLease
from continual.state.repair import look, repair
from continual.stores import ObjectPath, Where, where
from tests.helpers import object_stores, stores
from tests.helpers.cutting import Cutting, Fault
from tests.helpers.object_stores import findings

pytestmark = pytest.mark.slow


def test_a_second_writer_is_kept_out_and_the_first_may_be_followed(at: ObjectPath) -> None:
    short = where(str(at), 3.0)
    with stores.make(short) as state:
        state.set_url("http://127.0.0.1:1")
        with pytest.raises(
            Busy, match=r"is being written by process \d+ on .+ at http://127\.0\.0\.1:1; stop it first"
        ):
            State.open(short, write=True)
        assert lock.holder(short).url == "http://127.0.0.1:1"
        stores.fold(state, 1)
    assert lock.holder(short) == (None, None, None)
    with State.open(short, write=True) as state:
        assert stores.fold(state, 2) == 2
    assert [int(name[:-5]) for name in storing.names(short / "lock")] == [2]


def test_one_of_those_who_wait_for_a_dead_writer_follows_it(at: ObjectPath, caplog: pytest.LogCaptureFixture) -> None:
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
    assert (
        f"{short}: process {os.getpid()} on '{socket.gethostname()}' has it open for writing, or was killed"
        in caplog.text
    )
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

    monkeypatch.setattr("continual.state.bucket_holds.time.sleep", sleeps)
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


def test_a_reader_that_comes_while_a_generation_expires_has_it_or_is_told(
    at: ObjectPath, proxy: Cutting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each request of the expiry another one; until two found it marked."""
    fates: list[str] = []
    while fates.count("is told") < 2:
        place = f"{at.key}/{fates.count('is told')}"
        if "is told" in fates or not fates:
            with stores.make(object_stores.state_at(proxy.address, place, monkeypatch)) as state:
                for number in (1, 2):
                    stores.fold(state, number)
        through = object_stores.state_at(proxy.address, place, monkeypatch)
        asked: list[str] = []
        with State.open(through) as reader, contextlib.ExitStack() as held, State.open(through, write=True) as writer:

            def decide(
                method: str,
                path: str,
                held: contextlib.ExitStack = held,
                reader: State = reader,
                asked: list[str] = asked,
            ) -> Fault:
                asked.append(f"{method} {path}")
                if len(asked) == len(fates) + 1:
                    proxy.decide = lambda _method, _path: ""
                    try:
                        held.enter_context(reader.lease(1))
                        fates.append("has it")
                    except Misconfigured:
                        fates.append("is told")
                return ""

            proxy.decide = decide
            gone = writer.expire(1)
            assert bool(gone) is (fates[-1] == "is told"), asked
            if not gone:
                np.testing.assert_array_equal(reader.read("wide", "sum", 1), stores.value("wide", 1))
                assert writer.expire(1) == []
    assert fates == sorted(fates)
    assert fates.count("has it") > 3


def test_an_old_generation_whose_mark_was_left_is_nothing_to_go_back_to(at: ObjectPath) -> None:
    """The expiry was killed, or the store refused what came next: it goes on later, and must not meet what is in force
    again."""
    with stores.make(at) as state:
        for number in (1, 2):
            stores.fold(state, number)
        old = str(state.ledger.get(1).generation)
        storing.replace(at / f"generations/.expired-{old}/receipts.json", b"")
        with pytest.raises(Misconfigured, match="has expired"):
            state.rollback(1)
        assert state.generations() == [state.ledger.head.generation]
        state.expire(2)
        assert storing.names(at / "generations") == state.generations()


def test_a_mark_of_a_writer_that_had_been_stopped_deletes_nothing_that_is_needed_again(at: ObjectPath) -> None:
    """It was stopped between its last look at the lease and the mark; the next writer went back meanwhile."""
    with stores.make(at) as state:
        for number in (1, 2):
            stores.fold(state, number)
        state.tag("first", 1)
        first = str(state.ledger.get(1).generation)
        asked = iter((None, Halt("the lease ran out")))

        def may() -> None:
            if (said := next(asked)) is not None:
                raise said

        with pytest.raises(Halt, match="ran out"):
            holding.of(at).mark(at, first, may)
        assert first in state.generations()
        storing.replace(
            at / f"generations/.expired-{first}/receipts.json", b""
        )  # and it was killed before it took it back
        state.expire(1)
        assert first in state.generations()
        storing.replace(at / f"generations/.expired-{first}/receipts.json", b"")
    with State.open(at, write=True) as state:
        assert first in state.generations()
    assert findings(at) == []


def test_of_two_who_make_a_state_in_one_place_one_does(at: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is stopped before its last step, until its lease has run out."""
    short = where(str(at), 2.0)
    seal, made = store._seal, []

    def sealed(file: Where, data: bytes, may: Callable[[], None]) -> None:
        if not made:
            made.append("the first")
            stores.make(short).close()
            may = lambda: None  # noqa: E731  # and it was stopped just then
        seal(file, data, may)

    monkeypatch.setattr(store, "_seal", sealed)
    monkeypatch.setattr(heartbeat, "BEATS", 0.001)
    with pytest.raises(Retry, match=r"format\.json: another writer was first"):
        stores.make(short)
    with State.open(short, write=True) as state:
        assert stores.fold(state, 1) == 1
    assert findings(short) == []


def test_a_repair_that_lost_its_lease_moves_nothing(at: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.make(at) as state:
        for number in (1, 2):
            stores.fold(state, number)
        newest = at / f"generations/{state.ledger.head.generation}"
    storing.remove(newest / "sum/wide/c.0.0")
    quiet = lambda _done, _all: None  # noqa: E731
    plan = look(at, quiet)
    monkeypatch.setattr(WriterLease, "must_hold", _ran_out)
    before = storing.sizes(newest)
    with pytest.raises(Halt, match="ran out"):
        repair(at, plan, quiet)
    assert storing.sizes(newest) == before


def _ran_out(_lock: object) -> None:
    raise Halt("the lease of this writer ran out")


def test_who_may_list_below_the_prefix_alone_is_told_what_is_not_there(
    at: ObjectPath, proxy: Cutting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amazon says of an object that is not there that it may not be read, where a policy lets one prefix be listed."""
    stores.make(at).close()

    def decide(method: str, path: str) -> Fault:
        file = unquote(urlsplit(path).path).removeprefix(f"/{object_stores.BUCKET}/{at.key}/")
        read = method in ("GET", "HEAD") and "list-type" not in path
        return "denied" if read and file not in storing.sizes(at) else ""

    proxy.decide = decide
    through = object_stores.state_at(proxy.address, at.key, monkeypatch)
    with State.open(through, write=True) as state:
        assert stores.fold(state, 1) == 1
        assert stores.fold(state, 2) == 2
        assert len(state.expire(1)) == 1
        for file in ("HEAC", "HEADS", "z", "sum/x"):
            assert not (through / file).exists()
            with pytest.raises(FileNotFoundError):
                storing.contents(through / file)
    assert proxy.told["denied"] > 8
    assert findings(through) == []


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
        assert isinstance(lock_, WriterLease)
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
