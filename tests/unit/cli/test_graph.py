"""The ledger as a drawing: what is in force is on the line of HEAD, what was undone beside it, and no line is too
long."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from continual.cli.graph import graph
from continual.records import Candidate
from continual.state import State
from continual.state.entries import CombineEntry, FoldEntry, ReleaseEntry, ScaleEntry, UnfoldEntry
from continual.state.parts import BroughtFold
from tests.helpers import stores


def lines(state: State, most: int = 0) -> list[str]:
    """The drawing without dates and what is said of norms."""
    found = graph(state.ledger, most)
    assert all(cell_len(line) <= 80 for line in found), found
    return [re.sub(r" \d{4}-\d\d-\d\d|: norm.*|, \d folds? undone", "", line) for line in found]


def fold(state: State, number: int) -> int:
    """A fold without tensors of its own: a record alone."""
    return state.record(stores.entry(number)).seq


def test_a_line_without_rollbacks(memory: Path) -> None:
    with stores.make(memory / "s") as state:
        fold(state, 1)
        fold(state, 2)
        state.record(UnfoldEntry(candidate=stores.entry(1).candidate, of=1, key="k1"))
        state.record(ScaleEntry(read={"policy": "number", "value": 0.5}))
        weighed = replace(stores.entry(3), numbers=replace(stores.entry(3).numbers, weight=0.5))
        state.record(weighed)
        brought = tuple(BroughtFold(c.candidate, c.digest, c.numbers) for c in map(stores.entry, (4, 5)))
        state.record(CombineEntry(of="abcdef0123456789", seq=3, folds=brought))
        said = graph(state.ledger)
        assert lines(state) == [
            "* 6 (HEAD) combine with 2 models of abcdef01: n4, n5",
            "* 5 fold n3",
            "* 4 tune scale 0.5",
            "* 3 unfold n1 (record 1)",
            "* 2 fold n2",
            "o 1 fold n1",
            "* 0 init",
        ]
    assert said[1].endswith("fold n3: norm 1, weight 0.5")


def test_rollbacks_are_branches(memory: Path) -> None:
    with stores.make(memory / "s") as state:
        for number in range(1, 5):
            fold(state, number)
        state.rollback(1)
        fold(state, 5)
        state.rollback(3)
        state.tag("x")
        fold(state, 6)
        state.rollback(3)
        fold(state, 7)
        state.rollback(0)
        fold(state, 8)
        assert lines(state) == [
            "* 13 (HEAD) fold n8",
            "* 12 rollback to 0",
            "| o 11 fold n7",
            "| o 10 rollback to 3",
            "| | o 9 fold n6",
            "| | o 7 (x) rollback to 3",
            "| |/",
            "| | o 6 fold n5",
            "| | o 5 rollback to 1",
            "| | | o 4 fold n4",
            "| |_|/",
            "| o | 3 fold n3",
            "| o | 2 fold n2",
            "| |/",
            "| o 1 fold n1",
            "|/",
            "* 0 init",
        ]
        assert lines(state, 4)[-2:] == ["| o 10 rollback to 3", "| | (9 earlier)"]


def test_what_changes_no_merge_is_not_drawn_but_points_at_what_is(memory: Path) -> None:
    with stores.make(memory / "s") as state:
        fold(state, 1)
        state.tag("one")
        out = ReleaseEntry(of=2, repo="org/merged", branch="main", commit="c", tag=None, uploaded_bytes=0, files=1)
        state.record(out)
        state.record(out)
        state.tag("two", 3)
        assert lines(state) == ["* 1 (HEAD, one, two, released to org/merged) fold n1", "* 0 init"]


@pytest.mark.parametrize("name", ["x" * 300, "名" * 60, "a\nb\x1b[31m", "\u202eabc"])
def test_a_name_takes_one_line_of_eighty_columns(memory: Path, name: str) -> None:
    with stores.make(memory / "s") as state:
        fold(state, 1)
        state.rollback(0)
        entry = stores.entry(2)
        state.record(FoldEntry(candidate=Candidate("k", name, "t", "/o", "full", 1), digest="d", numbers=entry.numbers))
        found = lines(state)
    assert [line[:4] for line in found] == ["* 3 ", "* 2 ", "| o ", "|/", "* 0 "]
    assert all(line.isprintable() for line in found)
