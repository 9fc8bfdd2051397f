"""The records of the ledger: what is written comes back, what has another type is damage, and FORMAT.md knows them
all."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import Damaged
from continual.records import KEY, OMITTED, REST, MatrixTotals, Totals
from continual.state import State, framing
from continual.state.entries import ENTRIES, Entry, EntryKind, RefuseEntry, TuneEntry, UnfoldEntry, entry_of
from continual.state.fields import body_of, record_of
from continual.state.format import BaseRecord, Commit, FoldCommit, Format
from tests.helpers import house, stores
from tests.helpers.entries import ROUND, brought, candidate, row, select

FORMAT = Path(__file__).parents[3] / "state" / "FORMAT.md"
COMMON = {field.name for field in dataclasses.fields(Entry)}
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
TOTALS = st.builds(Totals, NUMBER, NUMBER, NUMBER, NUMBER, st.none() | st.builds(MatrixTotals, NUMBER, NUMBER, NUMBER))
WORDS: dict[object, st.SearchStrategy[Any]] = {
    str: st.text(max_size=5),
    int: st.integers(),
    float: NUMBER,
    bool: st.booleans(),
    type(None): st.none(),
    object: st.text(max_size=3) | NUMBER,
    Totals: TOTALS,
}


def values(kind: object) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, of = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and kind in WORDS:
        return WORDS[kind]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return records(kind)
    if origin is Literal:
        return st.sampled_from(of)
    if origin in (Union, types.UnionType):
        return st.one_of([values(part) for part in of])
    if origin is tuple and of[-1] is Ellipsis:
        return st.lists(values(of[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, of))
    assert origin is Mapping, kind
    return st.dictionaries(st.text(max_size=3), values(of[1]), max_size=2)


def records(kind: type) -> st.SearchStrategy[Any]:
    """Instances of a dataclass. Names of the keys that no field has are long, so that they are nobody's."""
    hints = get_type_hints(kind)
    rest = st.dictionaries(st.text("gauge", min_size=12, max_size=13), NUMBER, max_size=2)
    found = {f.name: rest if f.metadata.get(REST) else values(hints[f.name]) for f in dataclasses.fields(kind)}
    return st.builds(kind, **found)


def read_again(entry: Entry) -> Entry:
    return entry_of(json.loads(framing.encode(entry.body())[0].partition(b"\n")[2]), "a record")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENTRIES, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_record_comes_back_as_it_was_written(kind: type[Entry], data: st.DataObject) -> None:
    entry = data.draw(records(kind))
    assert read_again(entry) == entry
    assert entry.body() == read_again(entry).body()


@settings(deadline=None, max_examples=15)
@given(base=records(BaseRecord))
def test_a_base_comes_back_as_it_was_written(base: BaseRecord) -> None:
    assert record_of(BaseRecord, json.loads(json.dumps(body_of(base))), "format.json") == base


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENTRIES, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_a_value_of_another_type_is_damage_and_its_key_is_named(kind: type[Entry], data: st.DataObject) -> None:
    body = json.loads(json.dumps(data.draw(records(kind)).body()))
    for path, inner in (("", body), (r"numbers\.", body["numbers"] or {})):
        for name, value in list(inner.items()):
            alien = "x" if isinstance(value, int | float) else 5.5
            if value is None or (not path and name in ("numbers", "kind")):
                continue
            inner[name] = alien
            with pytest.raises(Damaged, match=rf"^commits/7: {path}{re.escape(name)}(\.\S+)? is "):
                entry_of(body, "commits/7")
            inner[name] = value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"numbers": 3}, "commits/7: numbers is 3, no object"),
        ({"kind": "merge"}, "commits/7: kind is 'merge', none of init, fold, "),
        ({"kind": ["fold"]}, r"commits/7: kind is \['fold'\], none of init, fold, "),
        ({"candidate": None}, "commits/7: candidate is None, no object"),
        ({"candidate": {"key": "k"}}, "commits/7: candidate.name is missing"),
        ({"fate": "gone"}, "commits/7: fate is 'gone', none of folded, "),
        ({"software": {"continual": 1}}, "commits/7: software.continual is 1, no text"),
        ({"totals": {"count": True}}, "commits/7: totals.count is True, no finite number"),
        ({"totals": {"weight": math.inf}}, "commits/7: totals.weight is inf, no finite number"),
    ],
)
def test_damage_is_said_in_words(change: dict[str, Any], said: str) -> None:
    body = RefuseEntry(candidate=candidate("a")).body() | change
    with pytest.raises(Damaged, match=f"^{said}"):
        entry_of(body, "commits/7")


def test_a_place_deep_in_a_table_is_named() -> None:
    body: Any = select(row("a", "deferred", 1), row("b", "chosen", 0)).body()
    body["numbers"]["scores"][1]["z"] = "high"
    with pytest.raises(Damaged, match=r"^commits/7: numbers\.scores\.1\.z is 'high', no finite number"):
        entry_of(body, "commits/7")
    del body["message"]
    with pytest.raises(Damaged, match=r"^commits/7: 'message' is missing"):
        entry_of(body, "commits/7")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_record_holds_what_is_no_number(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        framing.encode({"x": [value]})
    with stores.make(tmp_path / "s") as state:
        before = sorted(p for p in (tmp_path / "s").rglob("*"))
        with pytest.raises(ValueError, match="not JSON compliant"):
            state.record(dataclasses.replace(select(), loss=value))
        assert [c.seq for c in state.ledger.log] == [0]
        assert sorted(p for p in (tmp_path / "s").rglob("*")) == before, "nothing was written"
    with State.open(tmp_path / "s") as state:
        assert len(state.ledger.log) == 1


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_file_that_has_one_is_damaged(tmp_path: Path, word: str) -> None:
    text = f'{{"x":{word}}}\n'.encode()
    (tmp_path / "0.json").write_bytes(framing.crc(text).encode() + b"\n" + text)
    with pytest.raises(Damaged, match=rf"0\.json is damaged: {word} is no number"):
        framing.decode(tmp_path / "0.json")


def test_the_format_page_has_every_kind_and_every_key() -> None:
    page = FORMAT.read_text("utf-8")
    line = next(line for line in page.splitlines() if line.startswith("| `kind` |"))
    assert (
        set(re.findall(r"`([\w-]+)`", line)) - {"kind"} == {entry.kind for entry in ENTRIES} == set(get_args(EntryKind))
    )
    words = set(re.findall(r"`([\w-]+)`", page))

    def keys(kind: object) -> set[str]:
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not Totals:
            hints = get_type_hints(kind)
            own = {str(f.metadata.get(KEY, f.name)) for f in dataclasses.fields(kind) if not f.metadata.get(REST)}
            return own.union(*(keys(hint) for hint in hints.values()))
        return set().union(*(keys(part) for part in get_args(kind)))

    lacking = {kind.__name__: found for kind in (*ENTRIES, BaseRecord) if (found := keys(kind) - words)}
    assert lacking == {}


def test_what_is_left_out_and_what_is_null() -> None:
    bare: Any = RefuseEntry(candidate=candidate("a")).body()
    assert set(bare) == {"kind", "numbers", *COMMON}, "all keys are present"
    assert set(bare["candidate"]) == {"key", "name", "source", "origin", "form", "bytes"}
    assert bare["numbers"] is None
    known: Any = RefuseEntry(candidate=dataclasses.replace(candidate("a"), revision="1", licence="mit")).body()
    assert set(known["candidate"]) - set(bare["candidate"]) == {"revision", "licence"}
    table: Any = select(row("a", "deferred", 1)).body()["numbers"]
    assert (table["scores"][0]["z"], table["scores"][0]["place"]) == (None, None)
    assert not {"active", "rest", "folds", "out"} & set(table)
    weighed: Any = select(active={"k-a": (0.5,)}, rest=(), folds=(brought("a"),), out=()).body()["numbers"]
    assert weighed["folds"][0]["numbers"] == {"tau_norm": 2.0, "weight": 0.5}
    assert (weighed["active"], weighed["rest"], weighed["out"]) == ({"k-a": [0.5]}, [], [])


def test_totals_are_empty_where_the_state_begins_anew() -> None:
    out = UnfoldEntry(candidate=candidate("a"), of=1, key="k-a", totals=Totals())
    assert out.body()["totals"] == {}
    subtracted: Any = dataclasses.replace(out, tau_norm=1.0, merged_norm=0.0).body()
    assert set(subtracted["totals"]) == {"count", "weight", "norm_sum", "merged_sq"}
    assert read_again(out) == out


def test_a_round_asks_as_another_whatever_its_members_are() -> None:
    assert ROUND.asks_as(dataclasses.replace(ROUND, members=(), message="again"))
    for other in (
        dataclasses.replace(ROUND, mode="frank-wolfe"),
        dataclasses.replace(ROUND, asked=dataclasses.replace(ROUND.asked, trial=0.5)),
        dataclasses.replace(ROUND, objective=dataclasses.replace(ROUND.objective, digest="blake3:2")),
    ):
        assert not ROUND.asks_as(other)


def test_a_commit_is_read_as_the_kind_it_is() -> None:
    commit = Commit.of(Commit(3, "a", "", None, None, "t", ROUND).body(), "c", Path("commits/3"))
    assert commit.of_kind(type(ROUND)) == ROUND
    assert (commit.seq, commit.prev, commit.crc, commit.time) == (3, "a", "c", "t")
    with pytest.raises(AssertionError):
        commit.of_kind(TuneEntry)
    with pytest.raises(Damaged, match=r"^commits/3: seq is '3', no whole number"):
        Commit.of(commit.body() | {"seq": "3"}, "c", Path("commits/3"))
    assert not isinstance(commit, FoldCommit)


def test_records_are_frozen_and_their_optional_fields_have_a_default() -> None:
    for kind in ENTRIES:
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        for field in dataclasses.fields(kind):
            assert not field.metadata.get(OMITTED) or field.default is None, field.name


BY_NAME = {"numbers", "candidate", "totals", "base"}


def by_key(tree: ast.AST) -> list[int]:
    """Lines in which something of one of these names is read by a key: `x.numbers["a"]`, `totals.get("a")`."""

    def named(node: ast.AST) -> bool:
        if isinstance(node, ast.BoolOp):
            return any(named(value) for value in node.values)
        return (isinstance(node, ast.Name) and node.id in BY_NAME) or (
            isinstance(node, ast.Attribute) and node.attr in BY_NAME
        )

    def keyed(node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):
            return named(node.value) and isinstance(node.slice, ast.Constant | ast.Name | ast.JoinedStr)
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        taking = ("get", "items", "keys", "pop")
        return call and node.func.attr in taking and named(node.func.value)  # type: ignore[attr-defined]

    return [node.lineno for node in ast.walk(tree) if keyed(node)]  # type: ignore[attr-defined]


ALONE = {"continual.removal.verifier"}
"""What checks a proof without this package: it reads the files as they are."""


def test_nothing_outside_the_state_reads_a_record_by_key() -> None:
    found = {
        name: lines
        for name, module in house.modules().items()
        if module.room != "state" and name not in ALONE and (lines := by_key(ast.parse(module.text)))
    }
    assert found == {}


def test_the_scan_sees_such_a_reading() -> None:
    for text in (
        'commit.entry.numbers["of"]',
        '(commit.entry.numbers or {})["of"]',
        '(c.entry.candidate or {}).get("key")',
        "totals[key]",
        "state.format.base.items()",
    ):
        assert by_key(ast.parse(text)) == [1], text
    assert by_key(ast.parse("entry.numbers.tau_norm, dealt.numbers[rows[0]], chosen['numbers']")) == []


def test_what_the_format_of_a_state_lacks_is_named(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    path = tmp_path / "s" / "format.json"
    body: Any = framing.decode(path)[0]
    assert Format.of(body, path).body() == body
    for change, said in (
        ({"base": body["base"] | {"squares": {"a": "x"}}}, "base.squares.a is 'x', no finite number"),
        ({"base": {"path": "/b"}}, "base.files is missing"),
        (
            {"tensors": [body["tensors"][0] | {"kind": "odd"}]},
            "tensors.0.kind is 'odd', none of matrix, stack, plain, carried",
        ),
        ({"tensors": [body["tensors"][0] | {"shape": [1.5]}]}, "tensors.0.shape.0 is 1.5, no whole number"),
        ({"id": None}, "id is None, no text"),
    ):
        with pytest.raises(Damaged, match=re.escape(f"format.json: {said}")):
            Format.of(body | change, path)
