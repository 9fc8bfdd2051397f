"""What the state says of itself: who holds it, since when it is paused, what is in the way, and where."""

from __future__ import annotations

import os
import re
import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from continual.errors import Busy, Damaged, Retry
from continual.state import State, framing, paused, protocol
from continual.state import lock as locking
from continual.state.backup import Wish, backup
from continual.state.durable import link_tree
from continual.state.strays import strays
from continual.state.verify import verify
from tests.helpers import calls, stores


def test_who_writes_is_named_with_its_address_and_what_to_do(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        with pytest.raises(Busy) as raised:
            State.open(tmp_path / "s", write=True)
        who = f"{tmp_path / 's'} is being written by process {os.getpid()} on {socket.gethostname()}"
        assert (str(raised.value), raised.value.pid, raised.value.url) == (
            f"{who}; wait until it is done",
            os.getpid(),
            None,
        )
        state.set_url("http://127.0.0.1:8765")
        with pytest.raises(Busy, match=r"at http://127\.0\.0\.1:8765; stop it first") as raised:
            State.open(tmp_path / "s", write=True)
        assert raised.value.url == "http://127.0.0.1:8765"
        assert locking.holder(tmp_path / "s") == (
            os.getpid(),
            "http://127.0.0.1:8765",
            socket.gethostname(),
        )


def test_who_holds_the_lock_is_told_from_who_held_it(tmp_path: Path) -> None:
    """A lock on a shared disk may be another machine's, where the process cannot be looked for."""
    place = tmp_path / "s"
    assert locking.held(place) is None
    with stores.make(place):
        here = locking.held(place)
        assert here is not None
        assert here.said == f"{os.getpid()} on {socket.gethostname()}"
        (place / "lock").write_bytes(framing.encode({"pid": 1 << 30, "host": "another", "url": None})[0])
        there = locking.held(place)
        assert there is not None
        assert there.said == f"{1 << 30} on another"
    assert locking.held(place) is None
    (place / "lock").write_bytes(framing.encode({"pid": os.getpid(), "url": None})[0])  # as an earlier version has it
    assert locking.held(place) is None


def test_a_pause_says_since_when(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    since = paused.pause(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", since)
    assert before <= datetime.fromisoformat(since) <= datetime.now(UTC)
    assert paused.pause(tmp_path) == paused.since(tmp_path) == since
    (tmp_path / "paused").write_bytes(framing.encode({})[0])
    assert paused.since(tmp_path) == ""
    assert paused.resume(tmp_path)
    assert paused.since(tmp_path) is None


def test_a_pause_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    def full(called: calls.Called) -> object:
        return calls.fail(28)(called) if called.what == "open" else called.do()

    with calls.watched(tmp_path, full), pytest.raises(Retry, match=r"^cannot pause: "):
        paused.pause(tmp_path)
    assert paused.since(tmp_path) is None


def test_a_fold_that_cannot_begin_is_told(tmp_path: Path) -> None:
    def full(called: calls.Called) -> object:
        return calls.fail(28)(called) if called.what == "mkdir" else called.do()

    with (
        stores.make(tmp_path / "s") as state,
        calls.watched(tmp_path, full),
        pytest.raises(Retry, match=r"^cannot begin a fold: "),
    ):
        state.begin()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    (tmp_path / "s/HEAD").write_bytes(framing.encode({"seq": "one"})[0])
    with pytest.raises(Damaged, match=f"^{tmp_path}/s/HEAD: seq is 'one', no whole number"):
        protocol.read_head(tmp_path / "s")


def test_everything_that_is_wrong_is_found(tmp_path: Path) -> None:
    """A tagged generation that is gone, and a format.json of another state, at once."""
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        state.tag("one")
        stores.fold(state, 2)
        shutil.rmtree(tmp_path / "s/generations" / str(state.ledger.get(1).generation))
        (tmp_path / "s/format.json").write_bytes(b"00000000\n{}\n")
        found = verify(state)
    assert [line for line in found if "is tagged, but missing" in line]
    assert [line for line in found if "format.json is damaged" in line]


def test_every_generation_that_no_record_names_is_listed(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        for name in ("0" * 16, "f" * 16):
            (tmp_path / "s/generations" / name).mkdir()
        (tmp_path / "s/generations" / str(state.ledger.head.generation) / "note").touch()
        found = {stray.path for stray in strays(tmp_path / "s", state.format, state.ledger)}
    assert {f"generations/{'0' * 16}", f"generations/{'f' * 16}"} <= found
    assert any(name.endswith("/note") for name in found)


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_that_no_receipt_is_for_is_listed(tmp_path: Path, version: int) -> None:
    """Behind those of a layer, and of a layer of which nothing is kept: other readers of Zarr take it for values."""
    stores.history_of_adapters(tmp_path / "s", version)
    with State.open(tmp_path / "s") as state:
        assert strays(state.path, state.format, state.ledger) == []
        generation = state.generation_of(state.ledger.head)
        assert generation is not None
        place = state.format.layout.place
        more = [place("bias", "u").files()[1], place("never.weight", "v").files()[0]]
        for file in map(Path, map(generation.path, more)):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"chunk")
        found = {stray.path for stray in strays(state.path, state.format, state.ledger)}
        # in the format 2 a layer of which nothing is kept has no array
        expected = more if version == 3 else [more[0], str(Path(more[1]).parent)]
        assert found == {f"generations/{generation.directory.name}/{path}" for path in expected}
        assert verify(state) == []


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_that_a_fold_would_take_over_and_is_missing_is_damage(tmp_path: Path, version: int) -> None:
    """And not the matter of a disk, which trying again would settle."""
    stores.history_of_adapters(tmp_path / "s", version)
    with State.open(tmp_path / "s", write=True) as state:
        generation = state.generation_of(state.ledger.head)
        assert generation is not None
        place = state.format.layout.place("a.weight", "u")
        chunk = Path(generation.path(place.files()[0]))
        chunk.unlink()
        said = f"^tensor a.weight: chunk {chunk} is missing" if version == 3 else f"^chunk {chunk} is missing"
        with state.begin(writes=0) as transaction, pytest.raises(Damaged, match=said):
            transaction.keep("a.weight")
        with state.begin(writes=0) as transaction, pytest.raises(Damaged, match=said):
            transaction.write_rows("a.weight", "u", 20, stores.rows(1, 5)[:1])
        about = generation.directory / place.array / "zarr.json"
        about.unlink()
        with pytest.raises(Damaged, match=f"^{about} is missing"), state.begin(writes=0) as transaction:
            transaction.keep("a.weight")
        assert {path.name for path in (tmp_path / "s/generations").iterdir()} == set(state.generations())


def test_a_tree_is_linked_or_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_bytes(b"1")
    assert link_tree(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c/b/file").stat().st_ino == (tmp_path / "a/b/file").stat().st_ino

    def unlinkable(called: calls.Called) -> object:
        return calls.fail(18)(called) if called.what == "link" else called.do()

    with calls.watched(tmp_path, unlinkable):
        assert not link_tree(tmp_path / "a", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_the_steps_of_a_fold_are_told_in_their_order(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    steps: list[str] = []
    with State.open(tmp_path / "s", write=True, on_step=steps.append) as state:
        stores.fold(state, 1)
    writing = ["begin", "chunks", "fsync-files", "fsync-dirs"]
    assert steps == [*writing, "temp-commit", "link", "fsync-commits", "head", "acknowledged"]


def test_a_backup_counts_every_file(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
    told: list[tuple[str, int, int]] = []
    backup(tmp_path / "s", tmp_path / "b", Wish(), lambda *step: told.append(step))
    files = sum(len(names) for _, _, names in os.walk(tmp_path / "b/generations"))
    assert [step for step in told if step[0] == "copy"] == [("copy", n, files) for n in range(1, files + 1)]
