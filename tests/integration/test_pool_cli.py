"""The pool and its rounds from the command: what is printed for people and machines, what is said where something is
missing, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import quadratic
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ASK = ("--select", "relevance", "--objective", "tests.helpers.quadratic:make", "--max-base-ratio", "10")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the objective can be imported


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quadratic.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def candidates(base: Path) -> dict[str, Path]:
    found = [*(quadratic.good(base, k) for k in range(3)), *(quadratic.noise(base, k) for k in range(2))]
    return {path.name: path for path in found}


@pytest.fixture
def state(tmp_path: Path, base: Path) -> tuple[str, str]:
    place = tmp_path / "state"
    assert run("init", base, "--rule", "mean", "--state", place).returncode == 0
    return "--state", str(place)


def test_a_day_with_the_pool(state: tuple[str, str], candidates: dict[str, Path]) -> None:
    c = candidates
    command = [
        sys.executable,
        "-m",
        "continual",
        "fold",
        c["good0"],
        c["noise0"],
        c["good1"],
        *ASK,
        "--round",
        "patience=2",
        *state,
        "--json",
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    told = json.loads(first.stdout)
    assert [(m["model"], m["fate"], m["reason"]) for m in told["models"]] == [
        (n, "deferred", "waiting") for n in ("good0", "noise0", "good1")
    ]
    found = told["round"]
    assert {m["name"]: m["fate"] for m in found["members"]} == {
        "good0": "folded",
        "good1": "folded",
        "noise0": "deferred",
    }
    assert {"record", "loss", "before", "gap", "steps", "folds", "seconds", "members"} <= found.keys()
    assert (found["folds"], found["loss"] < found["before"]) == (2, True)
    assert {"key", "name", "fate", "reason", "message", "score", "change", "error", "z"} <= found["members"][0].keys()
    (waiting,) = machine("pool", *state)
    assert (waiting["name"], waiting["rounds"], waiting["form"], waiting["origin"]) == (
        "noise0",
        1,
        "full",
        str(c["noise0"]),
    )
    assert waiting["last"]["reason"] == "irrelevant"
    shown = run("pool", *state)
    assert (shown.returncode, "noise0" in shown.stdout, "round 1 of 2" in shown.stdout) == (0, True, True)
    why = machine("pool", "why", "noise0", *state)
    assert (why["name"], why["fate"], why["reason"], len(why["rounds"])) == ("noise0", "deferred", "irrelevant", 1)
    assert why["rounds"][0]["members"] == 3
    people = run("pool", "why", c["noise0"], *state).stdout
    assert people.startswith("noise0: deferred (irrelevant), first seen ")
    assert "scored better" in people
    assert run("pool", "why", "good0", *state).stdout.startswith("good0: folded, first seen ")
    done = run("pool", "round", *ASK, "--round", "patience=2", *state)
    assert (done.returncode, "irrelevant" in done.stdout, "0 folded in" in done.stdout) == (0, True, True), done.stderr
    assert run("pool", *state).stdout.strip().endswith("Nothing waits.")
    assert machine("pool", *state) == []
    again = run("fold", c["noise0"], *ASK, *state)
    assert (again.returncode, "already settled" in again.stderr) == (1, True)
    assert [r["kind"] for r in machine("log", *state)].count("select") == 2
    status = machine("status", *state, env={"CONTINUAL_SELECT": "relevance"})
    assert (status["select"], status["pool_size"], status["folds"], status["last_round"]["seq"] > 0) == (
        "relevance",
        0,
        2,
        True,
    )
    text = run("status", *state, env={"CONTINUAL_SELECT": "relevance"}).stdout
    assert "pool       0 wait for a round (relevance); last round " in text
    assert f": record {status['last_round']['seq']}, loss" in text
    assert machine("verify", *state)["ok"]


def test_a_dry_run_prints_and_records_nothing(state: tuple[str, str], candidates: dict[str, Path]) -> None:
    for name in ("good0", "noise1"):
        assert run("fold", candidates[name], *ASK, "--round", "sigmas=1000", *state).returncode == 0
    log = machine("log", *state)
    found = machine("pool", "round", "--dry-run", *ASK, *state)
    assert (found["record"], found["folds"]) == (None, 0)
    assert {m["name"]: m["reason"] for m in found["members"]}["good0"] == "relevant"
    people = run("pool", "round", "--dry-run", *ASK, *state)
    assert (people.returncode, "nothing recorded" in people.stdout) == (0, True)
    assert machine("log", *state) == log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--select", "relevance"), ("objective", "causal-lm", "module:function")),
        (("--select", "relevance", "--objective", "best"), ("objective", "'best'", "module:function")),
        (
            ("--select", "relevance", "--objective", "tests.helpers.quadratic:nothing"),
            ("tests.helpers.quadratic", "no function nothing"),
        ),
        (("--select", "relevance", "--objective", "no.such:make"), ("no.such:make",)),
        (("--select", "relevance", "--objective", "causal-lm"), ("rows",)),
        ((*ASK, "--rows", "x.jsonl"), ("rows", "built-in")),
        ((*ASK, "--round", "zise=3"), ("rounds.zise", "rounds.zise: unknown")),
        ((*ASK, "--round", "size"), ("size", "key=value")),
        ((*ASK, "--round", "size=many"), ("rounds.size", "many")),
        ((*ASK, "--round", "size=0"), ("rounds: size = 0", "at least 1")),
        ((*ASK, "--round", "trial=2"), ("rounds: trial", "at most 1")),
        ((*ASK, "--round", "step=best"), ("step", "corrective")),
        ((*ASK, "--round", "dtype=int4"), ("dtype", "bfloat16")),
        ((*ASK, "--round", "step=soft", "--round", "layers=true"), ("step = soft", "hard and corrective")),
        (("--select", "frank-wolfe", *ASK[2:]), ("frank-wolfe", "mean", "continual init")),
        (("--select", "best", *ASK[2:]), ("select", "best")),
    ],
)
def test_what_is_missing_or_wrong_is_said_before_anything_waits(
    state: tuple[str, str], candidates: dict[str, Path], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = run("fold", candidates["good0"], *arguments, *state)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    records = len(list((Path(state[1]) / "commits").iterdir()))
    assert records == 1 or "no.such:make" in arguments or "tests.helpers.quadratic:nothing" in arguments, (
        "nothing was recorded"
    )


def test_where_nobody_chooses_and_where_nothing_waits(state: tuple[str, str], candidates: dict[str, Path]) -> None:
    done = run("pool", "round", *state)
    assert (done.returncode, "select = none" in done.stderr) == (2, True)
    done = run("pool", "round", *ASK, *state)
    assert (done.returncode, "nothing waits in the pool" in done.stderr) == (2, True)
    done = run("pool", "why", "nobody", *state)
    assert (done.returncode, "nobody" in done.stderr, "continual pool" in done.stderr) == (2, True, True)
    done = run("fold", candidates["good0"], *state, "--max-base-ratio", "10")
    assert (done.returncode, "folded as record 1" in done.stdout) == (0, True), (
        "without rounds a model is folded at once"
    )


def test_settings_come_from_file_environment_and_flags(
    tmp_path: Path, state: tuple[str, str], candidates: dict[str, Path]
) -> None:
    settings = tmp_path / "continual.toml"
    settings.write_text(
        'select = "relevance"\nobjective = "tests.helpers.quadratic:make"\nmax_base_ratio = '
        "10\n[rounds]\npatience = 1\n"
    )
    told = machine("fold", candidates["good0"], candidates["noise0"], "--config", settings, *state, code=1)
    assert {m["name"]: m["fate"] for m in told["round"]["members"]} == {"good0": "folded", "noise0": "refused"}
    env = {
        "CONTINUAL_SELECT": "relevance",
        "CONTINUAL_OBJECTIVE": "tests.helpers.quadratic:make",
        "CONTINUAL_ROUNDS": "patience=1,sigmas=2",
    }
    told = machine("fold", candidates["noise1"], *state, "--max-base-ratio", "10", code=1, env=env)
    assert told["round"]["members"][0]["fate"] == "refused"
    asked = [r["numbers"]["asked"] for r in machine("log", *state) if r["kind"] == "round"]
    assert [(a["patience"], a["sigmas"]) for a in asked] == [(1, 3.0), (1, 2.0)]


def test_a_state_that_weighs_needs_no_select(tmp_path: Path, base: Path, candidates: dict[str, Path]) -> None:
    state = ("--state", str(tmp_path / "weighed"))
    assert run("init", base, *state, env={"CONTINUAL_SELECT": "frank-wolfe"}).returncode == 0
    done = run("fold", candidates["good0"], *ASK, *state)
    assert (done.returncode, "relevance" in done.stderr) == (2, True)
    told = run("fold", candidates["good0"], candidates["good1"], candidates["noise0"], *ASK[2:], *state)
    assert told.returncode == 0, told.stderr
    assert "step 1: loss" in told.stderr
    assert "2 folded in" in told.stdout
    status = machine("status", *state)
    assert (status["rule"], status["select"], status["folds"], status["pool_size"]) == (
        "frank-wolfe",
        "frank-wolfe",
        2,
        1,
    )
    assert all(0 < f["weight"] < 4 for f in status["last_folds"])
    log = run("log", *state)
    assert (log.returncode, "select" in log.stdout, "round" in log.stdout) == (0, True, True)
    assert Path(machine("export", tmp_path / "out", *state)["directory"]).is_dir()
    assert machine("verify", *state)["ok"]


def test_the_pool_has_help() -> None:
    for words in (("pool",), ("pool", "why"), ("pool", "round")):
        done = run(*words, "--help")
        assert (done.returncode, "--state" in done.stdout) == (0, True), words
