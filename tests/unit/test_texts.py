"""How values are written, for people and for machines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from continual import texts
from continual.state import Commit
from continual.state.entries import TagEntry


@dataclass(frozen=True)
class Inner:
    path: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    by_number: dict[int, Inner | None]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("Qwen2-0.5B ünï 模型 🙂", "Qwen2-0.5B ünï 模型 🙂"),
        ("\x1b[2J\x07a\x7f\x9b", r"\x1b[2J\x07a\x7f\x9b"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
        ("a\u2028\u2029\xa0b", r"a\u2028\u2029\xa0b"),
        ("caf\udce9 \ud800", r"caf\udce9 \ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("", ""),
    ],
)
def test_what_could_steer_a_terminal_or_mislead_a_reader_is_shown_as_an_escape(given: str, shown: str) -> None:
    assert texts.plain(given) == shown
    assert texts.plain(given).encode().isascii() or given.isprintable()


def test_a_long_text_is_cut_and_its_length_is_said() -> None:
    assert texts.plain("a" * 5, 5) == "aaaaa"
    assert texts.plain("a" * 6, 5) == "aaaaa… (6 characters)"
    assert texts.plain("\x1b" * 5, 5) == r"\x1b\… (5 characters)", "escapes count as they are shown"
    assert len(texts.plain("\x1b" * 10_000_000)) < 2100


def test_line_ends_stay_where_they_are_ours() -> None:
    assert texts.plain("a\n\x1bb\r\n", lines=True) == "a\n\\x1bb\\r\n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (56_700_000, "56.7 MB"),
        (4.2e9, "4.2 GB"),
        (1e12, "1 TB"),
        (2.5e15, "2.5e+03 TB"),
    ],
)
def test_sizes_have_three_figures_and_a_decimal_unit(nbytes: float, text: str) -> None:
    assert texts.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (3660, "1 h 1 min"), (180_000, "2 d 2 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert texts.duration(seconds) == text


def test_times_say_their_zone() -> None:
    assert texts.when("2026-01-31T10:11:12.123456Z") == "2026-01-31T10:11:12Z"
    assert texts.when("2026-01-31T10:11:12+00:00") == "2026-01-31T10:11:12Z"


def test_a_missing_figure_is_empty() -> None:
    assert (texts.figure(None), texts.figure(0.0), texts.figure(-1.23456)) == ("", "+0", "-1.23")
    assert texts.figure(1.23456, ".4g") == "1.235"


def test_a_tuned_scale_says_when_it_was_chosen() -> None:
    assert texts.scale("norm:0.5", None) == "norm:0.5"
    tuned = texts.scale("norm:0.5", {"record": 7, "folds": 5})
    assert tuned == "norm:0.5 (tuned at record 7, when 5 were folded)"


def test_records_become_what_json_holds() -> None:
    found = texts.jsonable(Outer(Inner(Path("a/b"), (1, 2)), {3: None, 4: Inner(Path("c"), ())}))
    assert found == {
        "inner": {"path": "a/b", "shape": [1, 2]},
        "by_number": {"3": None, "4": {"path": "c", "shape": []}},
    }


def test_a_ledger_record_has_its_place_and_then_what_it_says() -> None:
    commit = Commit(
        seq=3,
        prev="a" * 8,
        crc="c" * 8,
        generation=None,
        receipts=None,
        time="2026-01-31T10:11:12Z",
        entry=TagEntry(tag="v1", of=1, message="v1"),
    )
    body = texts.record(commit)
    assert list(body)[:6] == ["seq", "time", "generation", "prev", "crc", "kind"]
    assert (body["seq"], body["kind"], body["message"], body["candidate"]) == (3, "tag", "v1", None)
    assert "receipts" not in body


def test_json_can_hold_names_that_are_no_utf8() -> None:
    found = texts.jsonable({os.fsdecode(b"a\xe9"): [Path(os.fsdecode(b"caf\xe9"))]})
    assert json.loads(json.dumps(found, ensure_ascii=False).encode()) == {"a\\udce9": ["caf\\udce9"]}
