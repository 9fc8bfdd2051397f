"""What the Hub says, from bytes: whatever they are, only our errors come of it, and one bad repo spoils no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import ContinualError, Refuse
from continual.hub import Info, Trouble
from continual.hub.answers import (
    DoesNotFit,
    Misfit,
    commits_of,
    model_of,
    models_of,
    tags_of,
    tree_of,
)
from tests.loopback.hostile import SHA, WHEN, row

PARSERS: list[Callable[[bytes, str], Any]] = [models_of, model_of, tree_of, commits_of, tags_of]
GOOD = row("org/good", tags=["base_model:finetune:org/base"])


def told(content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../.."},
        {"id": "/etc/passwd"},
        {"id": "org/" + "a" * 1_000_000},
        {"id": 5},
        {"id": None},
        {"id": "org/a\ud800"},
        {"sha": SHA.upper()},
        {"sha": SHA[:39]},
        {"sha": 5},
        {"tags": None},
        {"tags": "base_model:org/base"},
        {"tags": ["good", 5]},
        {"tags": ["\ud800"]},
        {"tags": ["a" * 2000]},
        {"tags": ["a"] * 20_000},
        {"lastModified": "2026-01-31T12:00:00"},
        {"lastModified": "31 January"},
        {"lastModified": 5},
        {"lastModified": "9999-12-31T23:59:59-23:59"},
        {"lastModified": "0001-01-01T00:00:00+23:59"},
        {"gated": {"a": 1}},
        {"gated": 1e999},
        {"private": "no"},
        {"private": 10**300},
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_row_that_does_not_fit_is_told_of_and_the_others_are_read(change: dict[str, Any]) -> None:
    bad, good = models_of(told([row("org/bad") | change, GOOD]), "a list")
    assert isinstance(good, Info)
    assert good.id == "org/good"
    assert isinstance(bad, Misfit)
    key = next(iter(change))
    assert (bad.repo, bad.sha) == (None if key == "id" else "org/bad", None if key == "sha" else SHA)
    assert {"lastModified": "modified"}.get(key, key) in bad.why or key in bad.why
    assert len(bad.why) < 500
    bad.why.encode()


def test_what_more_is_said_is_passed_over_and_an_empty_repo_left_out() -> None:
    (found,) = models_of(told([GOOD | {"more": {"a": 1}, "gated": "manual"}, {"id": "org/empty"}]), "a list")
    assert isinstance(found, Info)
    assert found.gated
    assert found.modified == datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        b"[1]",
        b"[[]]",
        b"null",
        b"[" * 200_000,
        b"\xff\xfe",
        b"NaN",
        b"[[]" + b",[]" * 2_000_000 + b"]",
    ],
)
@pytest.mark.parametrize("parse", PARSERS)
def test_what_is_no_answer_is_trouble_of_the_hub(parse: Callable[[bytes, str], Any], body: bytes) -> None:
    if parse is tags_of and body == b"{}":
        assert parse(body, "it") == {}
        return
    with pytest.raises((Trouble, DoesNotFit), match=r"nothing was settled|does not fit"):
        parse(body, "it")


@pytest.mark.parametrize(
    ("siblings", "why"),
    [
        ([{"rfilename": "../x.safetensors", "size": 1}], "path of a file"),
        ([{"rfilename": "/etc/passwd", "size": 1}], "path of a file"),
        ([{"rfilename": "a/./b", "size": 1}], "path of a file"),
        ([{"rfilename": "a\0b", "size": 1}], "path of a file"),
        ([{"rfilename": "a\x1b[2Jb", "size": 1}], "path of a file"),
        ([{"rfilename": "a" * 5000, "size": 1}], "1024"),
        ([{"rfilename": "", "size": 1}], "path of a file"),
        ([{"rfilename": "\ud800", "size": 1}], "siblings.0"),
        ([{"rfilename": "a", "size": "12"}], "size"),
        ([{"rfilename": "a", "size": -1}], "size"),
        ([{"rfilename": "a", "size": 10**30}], "size"),
        ([{"rfilename": "a", "size": 1.5}], "size"),
        ([{"rfilename": "a", "size": True}], "size"),
        ([{"rfilename": "a", "size": 1}, {"rfilename": "a", "size": 2}], "twice"),
        ([{"rfilename": "a", "size": 1, "lfs": {"sha256": "x"}}], "sha256"),
        ([{"rfilename": "a", "size": 1, "lfs": {"sha256": "0" * 64, "size": 2}}], "of 1 bytes, and of 2"),
        ([{"rfilename": "a", "size": 1, "lfs": []}], "lfs"),
        ([5], "siblings"),
        (None, "siblings"),
        ({"a": 1}, "siblings"),
        ([{"rfilename": "a", "size": 1}] * 50_001, "50000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_do_not_fit_refuse_the_repo(siblings: Any, why: str) -> None:
    with pytest.raises(DoesNotFit, match=why) as refusal:
        model_of(told(row("org/bad", siblings=siblings)), "org/bad")
    assert (refusal.value.reason, refusal.value.repo, refusal.value.sha) == ("malformed", "org/bad", SHA)
    assert len(str(refusal.value)) < 600


def test_ten_thousand_files_and_names_that_differ_in_case_fit() -> None:
    names = [f"a/{n}.safetensors" for n in range(9998)] + ["Model.safetensors", "model.safetensors"]
    files = [{"rfilename": n, "size": 3, "blobId": "0" * 40, "lfs": {"sha256": "1" * 64, "size": 3}} for n in names]
    begun = time.perf_counter()
    found = model_of(told(row("org/many", siblings=files)), "org/many")
    assert len(found.files) == 10_000
    assert found.files["model.safetensors"].sha256 == "1" * 64
    assert found.weight_bytes == 30_000
    assert time.perf_counter() - begun < 5.0


def test_a_repo_without_a_commit_is_gone_and_an_answer_about_nothing_is_trouble() -> None:
    with pytest.raises(Refuse, match="empty") as refusal:
        model_of(told({"id": "org/empty", "sha": None}), "org/empty")
    assert refusal.value.reason == "gone"
    with pytest.raises(Trouble):
        model_of(told({"error": "come back later"}), "org/x")


def test_a_tree_a_history_and_tags() -> None:
    tree = [
        {"type": "directory", "path": "a", "oid": "0" * 40, "size": 0},
        {"type": "file", "path": "a/b", "oid": "1" * 40, "size": 4},
        {"type": "file", "path": "c", "oid": "2" * 40, "size": 5, "lfs": {"oid": "3" * 64, "size": 5}},
    ]
    assert {f.name: (f.size, f.oid[:1], f.sha256) for f in tree_of(told(tree), "it").values()} == {
        "a/b": (4, "1", None),
        "c": (5, "2", "3" * 64),
    }
    assert commits_of(told([{"id": SHA}]), "it") == [SHA]
    assert tags_of(told({"tags": [{"name": "v1", "targetCommit": SHA}], "branches": 5}), "it") == {"v1": SHA}


KEYS = st.sampled_from(
    ["id", "sha", "tags", "lastModified", "gated", "siblings", "rfilename", "size", "lfs", "oid", "path", "type"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", 10**40]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)
GOOD_VALUES = st.sampled_from([SHA, WHEN, "org/one", "model.safetensors", "file", 3, {"sha256": "0" * 64}])


@given(st.sampled_from(PARSERS), st.lists(st.dictionaries(KEYS, VALUES | GOOD_VALUES, max_size=8), max_size=4) | VALUES)
def test_whatever_json_says_only_our_errors_come_of_it(parse: Callable[[bytes, str], Any], content: Any) -> None:
    for body in (told(content), told(content[0]) if isinstance(content, list) and content else b"\x00"):
        try:
            parse(body, "it")
        except ContinualError as error:
            str(error).encode()
