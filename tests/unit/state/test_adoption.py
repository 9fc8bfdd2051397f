"""What stands above HEAD: what is adopted, what is not, and that it is said. And the format.json of another state."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from continual.errors import Damaged, Misconfigured
from continual.state import State, framing
from continual.state.entries import InitEntry
from continual.state.format import Commit
from continual.state.verify import verify
from tests.helpers import stores


@pytest.fixture
def behind(tmp_path: Path) -> Path:
    """A state of three folds, a tag and a rollback, whose HEAD was put back to the first fold."""
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        head = (tmp_path / "s/HEAD").read_bytes()
        stores.fold(state, 2)
        state.tag("two")
        stores.fold(state, 3)
        state.rollback(2)
    (tmp_path / "s/HEAD").write_bytes(head)
    return tmp_path / "s"


def test_a_whole_chain_above_head_counts_and_is_acknowledged(behind: Path, caplog: pytest.LogCaptureFixture) -> None:
    (behind / "tags/two.json").unlink()
    with State.open(behind) as state:
        assert (state.acknowledged, state.adopted, state.ledger.head.seq) == (1, (2, 3, 4, 5), 5)
        np.testing.assert_array_equal(state.read("wide", "sum"), stores.value("wide", 2))
    with caplog.at_level(logging.WARNING, "continual.state"), State.open(behind, write=True) as state:
        assert state.adopted == (2, 3, 4, 5)
        assert verify(state) == []
    assert [f"record {n} stands above HEAD" in line for n, line in zip((2, 3, 4, 5), caplog.messages, strict=True)] == [
        True
    ] * 4
    with State.open(behind) as state:
        assert (state.acknowledged, state.adopted, state.ledger.tags) == (5, (), {"two": 2})
        assert verify(state) == []


def generation(state: Path, seq: int) -> Path:
    """The generation of a record, whatever stands above HEAD."""
    body, checksum = framing.decode(state / f"commits/{seq:08d}.json")
    return state / "generations" / str(Commit.of(body, checksum, state).generation)


def forge(state: Path, seq: int, **changes: object) -> None:
    """Writes a record anew with other fields, and the ones after it so that the chain of checksums holds."""
    prev = None
    for file in sorted((state / "commits").iterdir()):
        body, checksum = framing.decode(file)
        commit = dataclasses.replace(Commit.of(body, checksum, file), prev=prev)
        if commit.seq == seq:
            commit = dataclasses.replace(commit, **changes)  # type: ignore[arg-type]
        data, prev = framing.encode(commit.body())
        file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a generation that is missing": (lambda s: shutil.rmtree(generation(s, 4)), "00000004.json.*cannot be taken up"),
    "a chunk that is missing": (lambda s: (generation(s, 2) / "sum/wide/c.0.0").unlink(), "c.0.0 is missing"),
    "a chunk that is cut": (lambda s: cut(generation(s, 2) / "sum/wide/c.0.0"), "bytes, and 2404 were written"),
    "receipts that are cut": (lambda s: cut(generation(s, 4) / "receipts.json"), "receipts.json is damaged"),
    "a gap": (lambda s: (s / "commits/00000003.json").unlink(), "records are missing"),
    "a record that is cut": (lambda s: cut(s / "commits/00000005.json"), "00000005.json is damaged"),
    "a tag that holds another generation": (
        lambda s: forge(s, 3, generation=generation(s, 4).name, receipts=receipts(s, 4)),
        "changes no tensor",
    ),
    "a fold that holds an older one": (
        lambda s: forge(s, 4, generation=generation(s, 1).name, receipts=receipts(s, 1)),
        "holds an older one",
    ),
    "a rollback to another record than it says": (
        lambda s: forge(s, 5, generation=generation(s, 1).name, receipts=receipts(s, 1)),
        "goes back to record 2, and holds another",
    ),
    "an old generation with other receipts": (lambda s: forge(s, 5, receipts="00000000"), "goes back to record 2"),
}


def receipts(state: Path, seq: int) -> str:
    return framing.decode(generation(state, seq) / "receipts.json")[1]


@pytest.mark.parametrize("harm", HARMS)
def test_what_its_writer_cannot_have_written_is_not_adopted(behind: Path, harm: str) -> None:
    spoil, words = HARMS[harm]
    spoil(behind)
    head = (behind / "HEAD").read_bytes()
    for write in (False, True):
        with pytest.raises(Damaged, match=words):
            State.open(behind, write=write)
    assert (behind / "HEAD").read_bytes() == head


def test_records_of_another_state_are_not_adopted(behind: Path, tmp_path: Path) -> None:
    with stores.make(tmp_path / "t") as other:
        for number in range(1, 7):
            stores.fold(other, number)
    for seq in (5, 6):
        shutil.copy(tmp_path / f"t/commits/{seq:08d}.json", behind / "commits")
    with pytest.raises(Damaged, match="does not follow the record before it"):
        State.open(behind)


def test_a_format_of_another_state_is_found(tmp_path: Path) -> None:
    for name in ("s", "t"):
        with stores.make(tmp_path / name) as state:
            stores.fold(state, 1)
    shutil.copy(tmp_path / "t/format.json", tmp_path / "s/format.json")
    with pytest.raises(Damaged, match=r"format.json is not the one that this state was made with"):
        State.open(tmp_path / "s")


def test_a_ledger_that_names_no_format_reads_as_before(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
    body, _ = framing.decode(tmp_path / "s/commits/00000000.json")
    assert body["numbers"] == {"format": framing.decode(tmp_path / "s/format.json")[1]}
    forge(tmp_path / "s", 0, entry=dataclasses.replace(state.ledger.log[0].of_kind(InitEntry), format=None))
    (tmp_path / "s/HEAD").write_bytes(
        framing.encode({"seq": 1, "crc": framing.decode(tmp_path / "s/commits/00000001.json")[1]})[0]
    )
    with State.open(tmp_path / "s") as state:
        assert verify(state) == []
    (tmp_path / "s/format.json").write_bytes(b"00000000\n{}\n")
    with pytest.raises(Damaged, match=r"format.json is damaged"):
        State.open(tmp_path / "s")


def test_directories_that_a_backup_left_out_are_made_again(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    for name in ("tags", "leases", "generations"):
        (tmp_path / "s" / name).rmdir()
    with State.open(tmp_path / "s") as state:
        assert verify(state) == []
        assert (state.orphans, state.generations()) == ((), [])
    with State.open(tmp_path / "s", write=True) as state:
        stores.fold(state, 1)
        state.tag("v1")
        assert state.expire(1) == []
        assert verify(state) == []


def test_a_directory_of_other_files_is_no_state_that_was_not_completed(tmp_path: Path) -> None:
    """It may have the names that a state has."""
    (tmp_path / "s/commits").mkdir(parents=True)
    (tmp_path / "s/commits/thesis.tex").write_text("mine")
    with pytest.raises(Misconfigured, match="is not empty"):
        stores.make(tmp_path / "s")
    assert (tmp_path / "s/commits/thesis.tex").read_text() == "mine"


def test_a_missing_directory_of_what_is_in_force_is_damage(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
    shutil.rmtree(tmp_path / "s/generations")
    with pytest.raises(Damaged, match="missing, and it is the generation in force"):
        State.open(tmp_path / "s", write=True)
    shutil.rmtree(tmp_path / "s/commits")
    with pytest.raises(Damaged, match="records are missing"):
        State.open(tmp_path / "s")
