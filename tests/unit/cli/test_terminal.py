"""What is printed for people: records in words within 80 columns, a status that is watched, sizes, what Tab offers."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len

from continual.cli import completing, console, live_status, recorded
from continual.cli.configuring import _text
from continual.errors import Retry
from continual.rules import catalogue
from continual.state.entries import RefuseEntry
from continual.texts import record
from tests.helpers import stores
from tests.helpers.command import run

BODY: dict[str, Any] = {
    "health": "ok",
    "why": "",
    "degraded": [],
    "head": 3,
    "folds": 2,
    "queued": 1,
    "current": {"model": "alice"},
}


class Narrow(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def narrow(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Such a terminal as standard output."""
    written = Narrow()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", written)
    return written


def test_rules_and_records_fit_into_80_columns(monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    terminal = narrow(monkeypatch)
    console.rules(catalogue.rules(), catalogue.transforms())
    shown = terminal.getvalue().partition("\nbefore")[0].splitlines()
    assert max(map(cell_len, shown)) <= 80
    assert len(shown) < 3 * len(catalogue.rules())
    assert all(line == line.rstrip() for line in shown)
    with stores.make(memory / "s") as state:
        state.record(stores.entry(1))
        entry = RefuseEntry(
            candidate=stores.entry(2).candidate, reason="shape", message="n2: another shape " + "x " * 60
        )
        state.record(entry)
        bodies = [record(commit) for commit in state.ledger.log]
    terminal = narrow(monkeypatch)
    recorded.many(bodies)
    lines = terminal.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "folded n1: norm 1" in terminal.getvalue()
    assert "refused n2 (shape): another shape x x" in terminal.getvalue()


def test_a_record_is_told_in_words(capsys: pytest.CaptureFixture[str], memory: Path) -> None:
    with stores.make(memory / "s") as state:
        body = record(state.ledger.get(state.record(stores.entry(1)).seq))
    numbers = dict(body["numbers"] | {"cosine": 0.0}) if isinstance(body["numbers"], dict) else {}
    recorded.whole({**body, "numbers": numbers, "list": [{"a_bytes": 1200}, {"b": True}]})
    told = capsys.readouterr().out
    assert "{" not in told
    assert "length of its task vector" in told
    assert "cosine" not in told
    assert "a bytes" in told
    assert "1.2 kB" in told
    assert "yes" in told


def test_a_screen_has_no_more_than_fits() -> None:
    lines = ["a" * 30, "漢" * 30, *map(str, range(9))]
    found = live_status.fitted(lines, 20, 5)
    assert [cell_len(line) <= 20 for line in found] == [True] * 5
    assert found[0].endswith("…")
    assert found[-1] == "… 7 more lines"
    assert live_status.fitted(["a", "b"], 20, 5) == ["a", "b"]


def test_where_nobody_looks_a_line_is_printed_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([BODY, BODY, {**BODY, "folds": 3}])

    def ask() -> dict[str, Any]:
        found = next(answers, None)
        if found is None:
            raise Retry("the disk is slow")
        return found

    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 5:
            raise KeyboardInterrupt

    live_status.watch(ask, 1.5, sleep)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("Z ")[2] for line in lines] == [
        "ok, record 3, 2 folded, 1 waiting, folding alice",
        "ok, record 3, 3 folded, 1 waiting, folding alice",
        "the disk is slow",
    ]
    assert looks == [1.5] * 5


def test_on_a_terminal_the_screen_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    with open(follower, "w", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(live_status, "text", live_status.brief)

        def sleep(_: float) -> None:
            raise KeyboardInterrupt

        live_status.watch(lambda: BODY, 1.0, sleep)
    shown = ""
    while not shown.endswith("\x1b[?1049l"):
        shown += os.read(leader, 10_000).decode()
    os.close(leader)
    os.close(follower)
    assert "ok, record 3" in shown
    assert shown.startswith("\x1b[?1049h")
    assert shown.endswith("\x1b[?25h\x1b[?1049l")


def test_sizes_are_written_as_a_settings_file_takes_them() -> None:
    assert _text(4_000_000_000, "memory") == "4 GB"
    assert _text(1_234_567, "hub.max_bytes") == "1.23 MB (1234567)"
    assert _text(3, "keep") == "3"


def test_tab_offers_tags_and_models(memory: Path) -> None:
    with stores.make(memory / "s") as state:
        state.record(stores.entry(1))
        state.record(RefuseEntry(candidate=stores.entry(2).candidate, reason="shape", message="n2: no"))
        state.tag("monday", 0)
    context = typer.Context(typer.core.TyperCommand("show"))
    context.params = {"state": memory / "s"}
    assert completing.refs(context, "") == ["HEAD", "monday"]
    assert completing.refs(context, "mo") == ["monday"]
    assert completing.merged(context, "") == ["n1"]
    assert completing.kept_out(context, "") == ["n2"]
    context.params = {"state": memory / "nothing"}
    assert completing.merged(context, "") == []


def test_watching_is_for_people(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        done = run("status", "--watch", "--json")
    assert done.returncode == 2
    assert "--json" in done.stderr


@pytest.mark.parametrize(
    "words", [("export", "s3://b/x"), ("demo", "--dir", "s3://b/x"), ("unfold", "m", "--certificate", "gs://b/x")]
)
def test_an_address_where_a_directory_has_to_be_is_told_of(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "this has to be a file or a directory on this machine, and no address" in done.stderr
