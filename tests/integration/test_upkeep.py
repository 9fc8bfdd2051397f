"""The commands that look after a state: the page about backups runs as it stands, and what each command prints."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import continual
from continual.state import State
from tests.helpers import models, stores
from tests.helpers.command import Done, machine, run
from tests.helpers.pages import DOCS, blocks

PAGE = DOCS / "backup.md"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the page names: a state with two models, and a third one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONTINUAL_STATE", raising=False)
    base = models.base(tmp_path / "base")
    for number, name in enumerate(("alice", "bob", "carol")):
        models.fine_tune(base, tmp_path / "fine-tunes" / name, number)
    assert run("init", base, "--rule", "mean").returncode == 0
    assert run("fold", "fine-tunes/alice", "fine-tunes/bob").returncode == 0
    return tmp_path


def do(line: str) -> Done:
    """A line of the page."""
    words = shlex.split(line, comments=True)
    if words[0] == "continual":
        return run(*words[1:])
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def block(number: int) -> list[Done]:
    """The lines of a block of the page, done."""
    return [do(line) for line in blocks(PAGE, "")[number].splitlines()]


@pytest.mark.slow
def test_what_the_page_says_is_what_happens(work: Path) -> None:
    assert len(blocks(PAGE, "")) == 7, "one of them is of packages and systemd: how to upgrade"
    backed = block(0)
    assert [done.returncode for done in backed] == [0, 0, 0], backed
    assert "3 new records, 2 new generations" in backed[0].stdout
    assert "0 new records, 0 new generations" in backed[1].stdout

    assert run("fold", "fine-tunes/carol").returncode == 0
    (work / "state/HEAD").unlink()
    assert [done.returncode for done in block(1)] == [0, 0, 0]
    assert folded(work / "state") == ["alice", "bob"]
    assert run("fold", "fine-tunes/carol").returncode == 0

    moved = block(2)
    assert [done.returncode for done in moved] == [0, 0]
    (work / "moved").rename(work / "state")

    assert [done.returncode for done in block(4)] == [0, 0], "carol is in it already"
    assert run("unfold", "carol", "--yes", "--state", "trial").returncode == 0
    assert folded(work / "trial") == ["alice", "bob"]
    assert folded(work / "state") == ["alice", "bob", "carol"]
    with continual.open("state") as one, continual.open("trial") as other:
        assert one.state.id != other.state.id
    assert "in both states" in run("combine", "trial").stderr

    flip(work / "state/commits/00000003.json")
    looked = block(5)
    assert [done.returncode for done in looked] == [4, 0]
    assert "continual repair --dry-run" in looked[0].stderr
    assert "record 3: cannot be read" in looked[1].stdout
    (done,) = block(6)
    assert done.returncode == 0
    assert "Repaired, as record 3" in done.stdout
    assert run("verify").returncode == 0
    assert folded(work / "state") == ["alice", "bob"]
    assert re.search(r"3 .* repair: to record 2: 1 record lost", run("log").stdout)
    assert run("fold", "fine-tunes/carol").returncode == 0, "it is seen again"


def folded(state: Path) -> list[str]:
    with State.open(state) as found:
        return [commit.entry.candidate.name for commit in found.ledger.folds()]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.slow
def test_an_export_of_one_is_no_fine_tune_of_the_other(work: Path) -> None:
    assert run("backup", "trial", "--as-clone").returncode == 0
    assert run("export", "ours").returncode == 0
    assert run("export", "theirs", "--state", "trial").returncode == 0
    told = {name: json.loads((work / name / "continual.json").read_text()) for name in ("ours", "theirs")}
    assert told["theirs"]["cloned"] == [told["ours"]["state"]]
    for state in ("state", "trial"):
        for model in ("ours", "theirs"):
            done = run("fold", model, "--state", state)
            assert (done.returncode, "is the merged model of" in done.stderr) == (1, True), (state, model, done)


def test_verify_names_strays_and_damage(tmp_path: Path) -> None:
    state = tmp_path / "s"
    stores.history(state)
    (state / "notes.txt").write_text("remember the milk")
    (state / "commits/.00000009.json.abcd1234.tmp").write_text("half")
    found = machine("verify", "--state", state)
    assert found["ok"]
    assert [(s["path"], s["nbytes"]) for s in found["strays"]] == [
        ("commits/.00000009.json.abcd1234.tmp", 4),
        ("notes.txt", 17),
    ]
    told = run("verify", "--state", state)
    assert told.returncode == 0
    assert re.search(r"notes\.txt +17 B +no part of the format", told.stdout)
    (state / "tags/first.json").write_bytes(b"?")
    found = machine("verify", "--state", state, code=4)
    assert not found["ok"]
    assert "first.json" in found["findings"][0]


def test_a_repair_asks(tmp_path: Path) -> None:
    state = tmp_path / "s"
    stores.history(state)
    assert "Nothing is damaged" in run("repair", "--state", state).stdout
    assert machine("repair", "--state", state) == {"plan": nothing(), "record": None}
    flip(state / "commits/00000005.json")
    before = sorted(state.rglob("*"))
    done = run("repair", "--state", state)
    assert (done.returncode, "say --yes" in done.stderr) == (2, True)
    assert sorted(state.rglob("*")) == before
    dry = machine("repair", "--state", state, "--dry-run")
    assert (dry["plan"]["to"], dry["record"]) == (4, None)
    assert dry["plan"]["lost"] == ["record 5: cannot be read", "record 6: rollback: back to record 2"]
    assert sorted(state.rglob("*")) == before
    made = machine("repair", "--state", state, "--yes")
    assert made["plan"] == dry["plan"]
    assert (made["record"]["seq"], made["record"]["kind"]) == (5, "repair")
    assert machine("log", "--state", state)[-1]["numbers"]["lost"] == dry["plan"]["lost"]


def nothing() -> dict[str, object]:
    lists = ("findings", "lost", "undone", "again", "tags", "generations", "aside", "tag_files", "inputs")
    return {"last": 6, "to": 6, **{name: [] for name in lists}}


def test_what_a_backup_says(tmp_path: Path) -> None:
    state, copy = tmp_path / "s", tmp_path / "b"
    stores.history(state)
    assert "would be at record 6: 7 new records" in run("backup", copy, "--state", state, "--dry-run").stdout
    assert not copy.exists()
    told = run("backup", copy, "--state", state)
    assert "Hard links are no protection" in told.stdout
    found = machine("backup", tmp_path / "c", "--state", state, "--copy", "--no-verify")
    assert (found["linked"], found["checked"], found["head"]) == (0, False, 6)
    done = run("backup", state, "--state", state)
    assert (done.returncode, "is the state: a backup needs" in done.stderr) == (2, True)
    shutil.rmtree(state)
    assert run("backup", copy, "--state", state).returncode == 2
