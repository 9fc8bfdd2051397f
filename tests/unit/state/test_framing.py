"""Any text goes into a record and comes back, or is refused in words before anything is written."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import Damaged, Refuse
from continual.records import Candidate
from continual.state import State, framing
from continual.state.entries import RefuseEntry
from tests.helpers import stores

PAIR = "\ud83d" + "\ude00"
ODD = ["\udcff", "\\\udc80", '"\ud800', "\udfff\ud800", "\x00\x1b[2J", "\u2028\u202e", "😀", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_equal(tmp_path: Path, text: str) -> None:
    entry = RefuseEntry(candidate=Candidate(f"folder:{text}", text, "hand", f"/{text}", "full", 1), message=text)
    with stores.make(tmp_path / "s") as state:
        state.record(entry)
    with State.open(tmp_path / "s") as state:
        read = state.ledger.head.entry
        assert (read.candidate, read.message) == (entry.candidate, text)
        assert state.ledger.is_settled(f"folder:{text}")
    (tmp_path / "s/commits/00000001.json").read_bytes().decode("utf-8")


def test_what_would_come_back_as_another_text_is_refused(tmp_path: Path) -> None:
    entry = RefuseEntry(candidate=Candidate("k", "n", "hand", "/n", "full", 1), message=f"before {PAIR} after")
    with stores.make(tmp_path / "s") as state:
        with pytest.raises(Refuse, match=r"before .* after.*no record can hold it") as refusal:
            state.record(entry)
        str(refusal.value).encode()
        assert len(state.ledger.log) == len(list((tmp_path / "s/commits").iterdir())) == 1
        assert state.record(dataclasses.replace(entry, message="plain")).seq == 1


@given(st.dictionaries(st.text(st.characters()), st.one_of(st.text(st.characters()), st.integers(), st.none())))
def test_every_body_is_read_as_it_was_written(body: dict[str, object]) -> None:
    try:
        data, checksum = framing.encode(body)
    except Refuse:
        assert any("\ud800" <= c <= "\udbff" for text in (*body, *body.values()) if isinstance(text, str) for c in text)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        assert framing.decode(Path(file.name)) == (body, checksum)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        framing.encode({"x": math.nan})


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b'{"a": NaN}', b"3", b"", b"{"])
def test_a_file_whose_checksum_is_right_and_that_is_no_record(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "f").write_bytes(framing.crc(text).encode() + b"\n" + text)
    with pytest.raises(Damaged, match=str(tmp_path / "f")):
        framing.decode(tmp_path / "f")


def test_a_directory_where_a_file_was_is_damage(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    (tmp_path / "s/HEAD").unlink()
    (tmp_path / "s/HEAD").mkdir()
    with pytest.raises(Damaged, match="is a directory"):
        State.open(tmp_path / "s")
