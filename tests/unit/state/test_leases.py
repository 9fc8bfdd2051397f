"""A reader holds its generation without a permission to write, and beside an expiry it has it or is told that it has
gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from continual.errors import Busy, Damaged, Misconfigured, Retry
from continual.state import State, framing, opening
from tests.helpers import stores
from tests.helpers.trace import at_event


@pytest.mark.parametrize("harm", ["missing", "read-only"])
def test_without_a_directory_of_leases_a_generation_is_held(tmp_path: Path, harm: str) -> None:
    with stores.make(tmp_path / "s") as writer:
        stores.fold(writer, 1)
        leases = tmp_path / "s/leases"
        if harm == "missing":
            leases.rmdir()
        else:
            leases.chmod(0o555)
        with State.open(tmp_path / "s") as reader, reader.lease():
            stores.fold(writer, 2)
            assert writer.expire(1) == []
            np.testing.assert_array_equal(reader.read("wide", "sum"), stores.value("wide", 1))
        assert writer.expire(1) == [writer.ledger.get(1).generation]


def held_by_another_user(file: Path) -> Iterator[None]:
    """A process of somebody who may read the state and nothing else holds the lock of a reader on `file`."""
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            fcntl.flock(os.open(file, os.O_RDONLY), fcntl.LOCK_SH)
            os.write(ready[1], b"x")
            os.close(done[1])
            os.read(done[0], 1)
            os._exit(0)
        finally:
            os._exit(1)  # a copy of the test run as nobody would go on with the other tests
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"x"
    yield
    os.close(done[1])
    assert os.waitpid(pid, 0)[1] == 0


def test_another_user_holds_a_generation() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    with tempfile.TemporaryDirectory() as directory, stores.make(Path(directory) / "s") as writer:
        stores.fold(writer, 1)
        Path(directory).chmod(0o755)  # pytest's own directories are for one user
        generation = next(Path(directory, "s/generations").iterdir())
        with contextmanager(held_by_another_user)(generation / "receipts.json"):
            stores.fold(writer, 2)
            assert writer.expire(1) == []
        assert writer.expire(1) == [generation.name]


def test_lease_files_of_earlier_versions_are_heeded(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as writer:
        generations = [writer.ledger.get(stores.fold(writer, number)).generation for number in (1, 2, 3)]
        alive, dead = (tmp_path / f"s/leases/{g}-00000000" for g in generations[:2])
        dead.write_text("")
        with alive.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert writer.expire(1) == [generations[1]]
            assert (alive.exists(), dead.exists()) == (True, False)
        assert writer.expire(1) == [generations[0]]


def test_who_looks_whether_a_state_is_locked_keeps_nobody_from_locking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.make(tmp_path / "s").close()
    looking = os.open(tmp_path / "s/lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: os.close(looking))
    with State.open(tmp_path / "s", write=True):
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits for who has it for long"))
        with pytest.raises(Busy):
            State.open(tmp_path / "s", write=True)


def test_an_expiry_between_the_lease_and_the_look_is_told(tmp_path: Path) -> None:
    """The reader takes the lease just after the generation has lost its name."""
    with stores.make(tmp_path / "s") as writer:
        stores.fold(writer, 1)
        with State.open(tmp_path / "s") as reader:
            stores.fold(writer, 2)
            receipts = tmp_path / "s/generations" / str(reader.ledger.head.generation) / "receipts.json"
            with (
                at_event("open", receipts, lambda: writer.expire(1)) as done,
                pytest.raises(Misconfigured, match="expired"),
                reader.lease(),
            ):
                raise AssertionError("the block runs although its generation has expired")
            assert done


def test_a_reader_that_opens_while_its_generation_expires_opens_the_next(tmp_path: Path) -> None:
    """Between the look whether the generation is there, and its receipts."""
    with stores.make(tmp_path / "s") as writer:
        stores.fold(writer, 1)
        receipts = tmp_path / "s/generations" / str(writer.ledger.head.generation) / "receipts.json"

        def go_on() -> None:
            stores.fold(writer, 2)
            writer.expire(1)

        with at_event("open", receipts, go_on) as done, State.open(tmp_path / "s") as reader:
            assert done
            np.testing.assert_array_equal(reader.read("wide", "sum"), stores.value("wide", 2))


def test_a_reader_that_is_always_too_late_is_told_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is missing, and no backup is to be restored. A record is read once, however often the log is listed."""
    number, read = 1, list[str]()
    with stores.make(tmp_path / "s") as writer:
        stores.fold(writer, number)

        def go_on(*_: object) -> None:
            nonlocal number
            number += 1
            stores.fold(writer, number)
            raise Damaged("the generation in force has expired")

        decode = framing.decode

        def decoded(file: Path) -> tuple[dict[str, object], str]:
            read.append(str(file))
            return decode(file)

        monkeypatch.setattr(opening, "_READS", 5)
        monkeypatch.setattr(opening, "_in_force", go_on)
        monkeypatch.setattr(framing, "decode", decoded)
        with pytest.raises(Retry, match="try again"):
            State.open(tmp_path / "s")
    records = [file for file in read if "/commits/" in file]
    assert len(records) == len(set(records)) == 6


def test_records_that_are_added_while_they_are_listed_are_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long directory is listed in pieces: the newest name may be there, and the one before it not."""
    with stores.make(tmp_path / "s") as writer:
        for number in range(1, 4):
            stores.fold(writer, number)
    listed, looks = opening._listed, 0

    def in_pieces(directory: Path) -> list[str]:
        nonlocal looks
        looks += directory.name == "commits"
        found = listed(directory)
        return [name for name in found if name != "00000002.json"] if looks == 1 else found

    monkeypatch.setattr(opening, "_listed", in_pieces)
    with State.open(tmp_path / "s") as reader:
        assert reader.ledger.head.seq == 3
    assert looks > 1


def test_a_damaged_generation_expires_all_the_same(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as writer:
        stores.fold(writer, 1)
        first = tmp_path / "s/generations" / str(writer.ledger.head.generation)
        stores.fold(writer, 2)
        (first / "receipts.json").unlink()
        assert writer.expire(1) == [first.name]
        assert not first.exists()


def test_a_copy_of_the_state_does_not_hold_the_state(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as writer:
        stores.fold(writer, 1)
        shutil.copytree(tmp_path / "s", tmp_path / "copy")
        with State.open(tmp_path / "copy") as reader, reader.lease():
            stores.fold(writer, 2)
            assert len(writer.expire(1)) == 1
