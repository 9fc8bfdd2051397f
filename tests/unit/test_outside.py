"""JSON and files of strangers: what is read of them, and what never is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.outside import (
    DEPTH,
    VALUES,
    Irregular,
    Malformed,
    few,
    open_regular,
    parse_fields,
    parse_json,
    read_regular,
    shown,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | characters,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(characters, inner, max_size=4),
    max_leaves=12,
)


@given(documents, st.booleans())
def test_what_json_writes_is_read_as_it_was(document: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(document, ensure_ascii=ascii_only).encode()) == document


@given(st.text('[]{}"\\:,a', max_size=40) | st.text(max_size=20))
def test_any_text_is_read_as_json_reads_it_or_is_malformed(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(Malformed):
            parse_json(text.encode("utf-8", "surrogatepass"))
        return
    try:
        found = parse_json(text.encode())
    except Malformed as error:
        found, said = expected, str(error)
    else:
        said = "twice"
    assert found == expected
    assert any(word in said for word in ("twice", "NaN", "Infinity", "too large", "surrogate"))


def nested(depth: int, inner: str = "") -> bytes:
    return ("[" * depth + inner + "]" * depth).encode()


@pytest.mark.parametrize("inner", ["", '"]]]]"', r'"\"]]"', r'"\\","]]"', r'"\\\"[[[[[[[["', "1"])
def test_depth_is_counted_outside_of_strings(inner: str) -> None:
    assert parse_json(nested(DEPTH, inner)) == json.loads(nested(DEPTH, inner))
    with pytest.raises(Malformed, match=f"{DEPTH} levels"):
        parse_json(nested(DEPTH + 1, inner))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (nested(100_000), "levels"),
        (b"[" * 100_000, "levels"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "levels"),
        (b'[{"a":' * 40 + b"1" + b"}]" * 40, "levels"),
        (b"[" + b"0," * VALUES + b"0]", "values"),
        (b'{"a": 1, "b": 2, "a": 3}', "a is there twice"),
        (b'[{"a": {"b": 1, "b": 1}}]', "b is there twice"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e400", "1e400"),
        (b"-1e400", "too large"),
        (b"0." + b"1" * 1000, "too long"),
        (b"9" * 5000, "thousands of digits"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (rb'"\ud800"', "surrogate"),
        (rb'"\uDFFF"', "surrogate"),
        (rb'"\udc00\ud800"', "surrogate"),
        (rb'"\ud83d\u0041"', "surrogate"),
        (rb'{"\ud83dx": 1}', "surrogate"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b"", "Expecting value at character 0"),
        (b"{} {}", "Extra data"),
        (b"[1", "Expecting"),
        (b'"' * 1000, "strings"),
    ],
)
def test_malformed(text: bytes, words: str) -> None:
    with pytest.raises(Malformed) as error:
        parse_json(text)
    assert words in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200


def test_whole_pairs_and_escaped_backslashes_are_characters() -> None:
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"
    assert parse_json(rb'"\\ud800"') == r"\ud800"


def test_an_object_is_asked_for() -> None:
    assert parse_fields(b'{"a": []}') == {"a": []}
    with pytest.raises(Malformed, match="no JSON object"):
        parse_fields(b"[]")


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b'"\\u0041\\\\",' * 150_000 + b"1]",
        b"[" + b"[]," * 400_000 + b"1]",
        (b"[" * 60 + b"]" * 60 + b",") * 8000,
        b"[" + b"9" * 4000 + b"," + b"8" * 4_000_000,
        b'{"a":' + b'"' + b"\\" * 3_000_000 + b'"}',
    ],
)
def test_large_texts_take_time_in_proportion(text: bytes) -> None:
    begun = time.thread_time()
    with contextlib.suppress(Malformed):
        parse_json(text)
    assert time.thread_time() - begun < 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("alice", "alice"),
        ("a\nb", r"'a\nb'"),
        ("\ud800", r"'\ud800'"),
        ([1, 2], "[1, 2]"),
        ({"a": [1]}, "{'a': [1]}"),
        ([[[[1]]]], "[[[…]]]"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, …]"),
        (10**1000, "a number of 3322 bits"),
        (None, "None"),
    ],
)
def test_values_in_messages(value: object, text: str) -> None:
    assert shown(value) == text


def test_names_in_messages_are_cut_after_a_few_with_the_number_of_the_rest() -> None:
    names = [f"n{number}" for number in range(7)]
    assert (few(()), few(names[:1]), few(names[:5])) == ("", "n0", "n0, n1, n2, n3, n4")
    assert few(iter(names)) == "n0, n1, n2, n3, n4 and 2 more"
    assert few(names[:5], 100) == "n0, n1, n2, n3, n4 and 95 more"
    assert few(names[:2], 2) == "n0, n1"


def test_a_large_value_is_not_looked_at_whole() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[[[…]]]"
    assert len(shown("x" * 10_000_000)) == 81
    assert len(shown(["y" * 10_000_000] * 1000)) == 81
    while deep:  # so that no destructor recurses
        deep = deep.pop()  # type: ignore[assignment]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 3) == b"abc"
    with pytest.raises(Malformed, match="more than 2 bytes"):
        read_regular(tmp_path / "file", 2)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name in ("fifo", "to-fifo", "device", "socket", "."):
            with pytest.raises(Irregular, match="no regular file"):
                open_regular(tmp_path / name)
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "self")


def test_a_fifo_is_not_even_touched(tmp_path: Path) -> None:
    """Who waits for a reader of a FIFO goes on waiting: it was not opened, not for a moment."""
    os.mkfifo(tmp_path / "fifo")
    met = threading.Event()

    def write() -> None:
        with open(tmp_path / "fifo", "wb"):
            met.set()

    waiting = threading.Thread(target=write, daemon=True)
    waiting.start()
    for _ in range(50):
        with pytest.raises(Irregular):
            open_regular(tmp_path / "fifo")
    assert not met.wait(0.2)
    os.close(os.open(tmp_path / "fifo", os.O_RDONLY))
    waiting.join(10)
    assert met.is_set()
