"""A backup, a clone and a repair, ended or failing at every call by which they change a file."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter as Bag
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from continual.errors import ContinualError, Misconfigured
from continual.state import Commit, State
from continual.state.backup import Wish, backup
from continual.state.entries import CloneEntry, RepairEntry
from continual.state.repair import look, repair
from continual.state.strays import strays
from continual.state.verify import verify
from tests.helpers import calls, stores
from tests.helpers.calls import Counter

pytestmark = pytest.mark.slow

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TOLD, UNDISTURBED = 10, 11
"""How a process ends in which an error of ours was raised; in which there were fewer calls."""


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a state of a few files, and a backup of it from before its newest records."""
    monkeypatch.setattr(stores, "SHAPES", {"a.weight": (3, 4), "scalar": ()})
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        path = Path(place) / "begun"
        stores.history(path / "state")
        made(path, Wish(copy=True))
        with State.open(path / "state", write=True) as state:
            stores.fold(state, 4)
            state.tag("first", 7, force=True)
            state.tag("second", 2)
            state.expire(1)
            stores.fold(state, 5)
        yield path


def made(path: Path, wish: Wish, name: str = "backup") -> None:
    backup(path / "state", path / name, wish, lambda _what, _done, _total: None)


def clean(path: Path) -> State:
    with State.open(path) as state:
        assert verify(state) == []
        return state


def opened(path: Path) -> Commit | str:
    """The newest record, or why there is no state."""
    try:
        return clean(path).ledger.head
    except Misconfigured as error:
        return str(error)


def forked(child: Callable[[], None]) -> int:
    """The exit code of a process that does `child`."""
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            child()
            code = 0
        except ContinualError:
            code = TOLD
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


Action = Callable[[Path], None]


EACH = int(os.environ.get("CONTINUAL_EACH_CALL", "0"))
"""1 has every call be the last one, where the gate takes one in a few."""


def at_every_call(begun: Path, action: Action, each: int, failure: int | None = None) -> Iterator[tuple[Path, int]]:
    """What `action` leaves of a copy of `begun` when it is killed, or fails, at each call, or one in `each`; and which
    call it was."""
    kinds = calls.CHANGES if failure is None else calls.FAILS[failure]
    then = calls.kill if failure is None else calls.fail(failure)
    for number in range(1, 3000, EACH or each):
        path = begun.with_name("run")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(begun, path)
        code = forked(partial(run, path, action, Counter(kinds.__contains__, number, then)))
        if code == UNDISTURBED:
            return
        assert code == calls.KILLED if failure is None else code in (0, TOLD), f"call {number}: exit code {code}"
        yield path, number


def run(path: Path, action: Action, counter: Counter) -> None:
    """Does `action` in `path`; the process ends so that one can see whether the counter came to its call."""
    with calls.watched(path, counter):
        action(path)
    assert counter.at is not None
    if counter.count < counter.at:
        os._exit(UNDISTURBED)


@pytest.mark.parametrize("wish", [Wish(), Wish(copy=True)], ids=["linked", "copied"])
def test_a_backup_that_is_killed_is_what_it_was_or_what_it_will_be(work: Path, wish: Wish) -> None:
    old = [c.crc for c in clean(work / "backup").ledger.log]
    new = [c.crc for c in clean(work / "state").ledger.log]
    found = Bag[bool]()
    for path, number in at_every_call(work, lambda path: made(path, wish), 7):
        log = [c.crc for c in clean(path / "backup").ledger.log]
        assert log in (old, new), number
        found[log == new] += 1
        shutil.copytree(path / "backup", path / "restored")
        with State.open(path / "restored", write=True) as state:
            stores.fold(state, 9)
        with State.open(path / "restored") as state:
            assert (verify(state), strays(state.path, state.format, state.ledger)) == ([], []), number
        made(path, wish)
        same(path)
    assert found[False] > 6
    assert found[True] > 0


def same(path: Path) -> None:
    """The backup is the state, with nothing left over."""
    state, copy = clean(path / "state"), clean(path / "backup")
    assert [c.crc for c in copy.ledger.log] == [c.crc for c in state.ledger.log]
    assert copy.generations() == state.generations()
    assert strays(copy.path, copy.format, copy.ledger) == []


@pytest.mark.parametrize("clone", [False, True], ids=["backup", "clone"])
def test_a_first_one_that_is_killed_is_no_state_until_it_is_whole(work: Path, clone: bool) -> None:
    head = clean(work / "state").ledger.head
    wish = Wish(clone=clone)
    for path, number in at_every_call(work, lambda path: made(path, wish, "first"), 7):
        found = opened(path / "first")
        if isinstance(found, str):
            assert "no state" in found or "not completed" in found, number
        else:
            assert found.prev == head.crc if clone else found.crc == head.crc
        if (path / "first/HEAD").exists() and clone and not (path / "first/backup.json").exists():
            continue  # it is whole, and a clone is made once
        made(path, wish, "first")
        ledger = clean(path / "first").ledger
        assert sum(isinstance(c.entry, CloneEntry) for c in ledger.log) == clone


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO])
def test_a_backup_that_fails_says_so_and_can_be_repeated(work: Path, failure: int) -> None:
    old = [c.crc for c in clean(work / "backup").ledger.log]
    new = [c.crc for c in clean(work / "state").ledger.log]
    for path, number in at_every_call(work, lambda path: made(path, Wish()), 29, failure):
        assert [c.crc for c in clean(path / "backup").ledger.log] in (old, new), number
        made(path, Wish())
        same(path)


def damaged(path: Path) -> None:
    """A record in the middle, an old generation and a tag are damaged."""
    with State.open(path) as state:
        name = state.ledger.get(2).generation
    (path / f"generations/{name}/sum/a.weight/c.0.0").unlink()
    (path / "commits/00000010.json").write_bytes(b"?")
    (path / "tags/first.json").write_bytes(b"?")


def mended(path: Path) -> None:
    repair(path, look(path, lambda _done, _total: None), lambda _done, _total: None)


def contents(path: Path) -> Bag[bytes]:
    return Bag(p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock")


def test_a_repair_that_is_killed_can_be_repeated_and_says_the_same(work: Path) -> None:
    damaged(work / "state")
    plan = look(work / "state", lambda _done, _total: None)
    assert (plan.last, plan.to, plan.tags, plan.tag_files) == (9, 9, ("second",), ("first",))
    assert len(plan.lost) == 1
    before = contents(work / "state")
    runs = 0
    for path, number in at_every_call(work, lambda path: mended(path / "state"), 3):
        runs += 1
        again = look(path / "state", lambda _done, _total: None)
        if again.findings:
            mended(path / "state")
        with State.open(path / "state", write=True) as state:
            assert verify(state) == [], number
            entries = [c.entry for c in state.ledger.log if isinstance(c.entry, RepairEntry)]
            assert entries[0].lost == plan.lost, number
            assert (set(entries[0].tags), state.ledger.tags) == ({"second"}, {"first": 7}), number
            assert set(plan.generations) == set(entries[0].generations), number
        assert not before - contents(path / "state"), f"call {number}: a file is gone"
        assert not look(path / "state", lambda _done, _total: None).findings
    assert runs > 7
