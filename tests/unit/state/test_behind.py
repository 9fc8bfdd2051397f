"""A record that stands although what follows it failed: it counts at once, the log says so, and nothing more is written
before that is made up for."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from continual.errors import Halt, Retry
from continual.state import State, durable
from continual.state.verify import verify
from tests.helpers import calls, stores
from tests.helpers.calls import Called


@contextmanager
def failing(root: Path, what: str, part: str, number: int = errno.ENOSPC, *, late: bool = False) -> Iterator[list[str]]:
    """Has every call of the kind `what` fail whose path, with a dollar at its end, has `part` in it; yields the
    paths."""
    met: list[str] = []

    def act(called: Called) -> Any:
        if called.what == what and part in f"{called.path}$":
            met.append(called.path)
            return (calls.fail_after if late else calls.fail)(number)(called)
        return called.do()

    with calls.watched(root, act):
        yield met


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with stores.make(tmp_path / "s") as made:
        stores.fold(made, 1)
        yield made


def names(state: State) -> list[str]:
    return sorted(p.name for p in (state.path / "commits").iterdir())


def test_a_fold_whose_head_cannot_be_written_is_folded(state: State, caplog: pytest.LogCaptureFixture) -> None:
    with failing(state.path, "open", "/.HEAD."), caplog.at_level(logging.WARNING, "continual.state"):
        assert stores.fold(state, 2) == 2
        assert state.behind is not None
        assert "record 2 is committed" in state.behind
        assert "disk is full: free some space" in state.behind
        with pytest.raises(Retry, match=r"has to be done first.*disk is full.*nothing was settled"):
            stores.fold(state, 3)
        with pytest.raises(Retry, match="nothing was settled"):
            state.tag("v1")
        assert state.expire(1) == []
    assert [line.partition(", and")[0] for line in caplog.messages] == ["record 2 is committed"]
    assert len(names(state)) == 3
    with State.open(state.path) as reader:
        assert (reader.ledger.head.seq, reader.acknowledged) == (2, 1)
    assert stores.fold(state, 3) == 3
    assert (state.behind, verify(state)) == (None, [])
    with State.open(state.path) as reader:
        assert (reader.ledger.head.seq, reader.acknowledged) == (3, 3)


@pytest.mark.parametrize("what", ["rename", "open to read"])
def test_two_failures_in_one_process_leave_nothing_to_repair(state: State, what: str) -> None:
    part = "/HEAD" if what == "rename" else "/.HEAD."
    with failing(state.path, what, part, errno.EIO) as met:
        assert stores.fold(state, 2) == 2
        with pytest.raises(Retry, match="nothing was settled"):
            stores.fold(state, 3)
        assert len(met) == 2
    state.close()
    with State.open(state.path, write=True) as again:
        assert (again.ledger.head.seq, again.adopted) == (2, (2,))
        assert verify(again) == []
    assert [p for p in state.path.rglob(".*") if p.name.endswith(".tmp")] == []


def test_a_tag_whose_file_cannot_be_written_stands_and_is_completed(state: State) -> None:
    with failing(state.path, "rename", "/tags/"):
        state.tag("v1")
        assert state.ledger.tags == {"v1": 1}
        with State.open(state.path) as reader:
            assert verify(reader) == []
    stores.fold(state, 2)
    assert (state.path / "tags/v1.json").exists()
    with State.open(state.path) as reader:
        assert verify(reader) == []


def test_a_link_that_was_made_although_it_failed_counts(state: State) -> None:
    with failing(state.path, "link", "/commits/", errno.EIO, late=True) as met:
        assert stores.fold(state, 2) == 2
        assert met
    assert (state.behind, verify(state), len(state.ledger.log)) == (None, [], 3)


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_at_the_commit_point_takes_no_generation_from_its_record(
    state: State, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    link = durable.link_new

    def interrupted(file: Path, temporary: Path) -> None:
        if late:
            link(file, temporary)
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "link_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stores.fold(state, 2)
    monkeypatch.undo()
    state.close()
    with State.open(state.path, write=True) as again:
        assert again.ledger.head.seq == (2 if late else 1)
        assert verify(again) == []
        assert len(list((state.path / "generations").iterdir())) == len(again.generations()) == (2 if late else 1)


def test_a_temporary_record_that_cannot_be_removed_undoes_nothing(state: State) -> None:
    with failing(state.path, "unlink", "/commits/", errno.EIO) as met:
        assert stores.fold(state, 2) == 2
        assert met
    state.close()
    with State.open(state.path, write=True) as again:
        assert again.ledger.head.seq == 2
    assert all(not p.name.startswith(".") for p in (state.path / "commits").iterdir())


@pytest.mark.parametrize(("part", "stands"), [("/commits$", 3), ("/.HEAD.", 3), ("/generations$", 2)])
def test_an_fsync_that_fails_halts_for_good(state: State, part: str, stands: int) -> None:
    with failing(state.path, "fsync", part, errno.EIO) as met:
        with pytest.raises(Halt, match="check the disk"):
            stores.fold(state, 2)
        assert met
    if stands == 2:
        return
    with pytest.raises(Halt, match="check the disk"):
        stores.fold(state, 3)
    assert len(names(state)) == stands
    state.close()
    with State.open(state.path, write=True) as again:
        assert again.ledger.head.seq == 2
        assert verify(again) == []


def test_a_directory_that_cannot_be_listed_is_not_passed_over(state: State) -> None:
    with state.begin() as unsynced:
        for name in stores.SHAPES:
            unsynced.keep(name)
        sealed = unsynced.seal()
    with failing(state.path, "scandir", "/sum", errno.EIO) as met, state.begin(sealed) as transaction:
        for name in stores.SHAPES:
            transaction.keep(name)
        with pytest.raises(Retry, match="nothing was settled"):
            state.commit(transaction, stores.entry(2))
        assert met
    assert names(state) == ["00000000.json", "00000001.json"]


def test_an_expiry_that_fails_undoes_nothing_and_is_made_up_for(state: State, caplog: pytest.LogCaptureFixture) -> None:
    stores.fold(state, 2)
    with (
        failing(state.path, "rmdir", "/generations", errno.EIO),
        caplog.at_level(logging.WARNING, "continual.state"),
    ):
        assert state.expire(1) == [state.ledger.get(1).generation]
    assert "old generations stay until the next fold" in caplog.text
    assert len(list((state.path / "generations").iterdir())) == 2
    assert state.expire(1) == []
    assert [p.name for p in (state.path / "generations").iterdir()] == state.generations()


def test_a_begin_that_fails_leaves_nothing(state: State) -> None:
    with failing(state.path, "open", "/zarr.json"), pytest.raises(Retry, match="cannot begin a fold"):
        state.begin()
    assert len(list((state.path / "generations").iterdir())) == 1
