"""Tuning by a command: how often it is asked, on what, what is recorded, and what becomes of commands that fail. No
model runs; a script reads the weights."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from continual import api, making, tuning
from continual.errors import Misconfigured, Retry
from continual.publish import folder
from continual.publish.folder import Target
from continual.rules import ReadOptions
from continual.state.entries import TuneEntry
from continual.state.transaction import room
from continual.state.verify import verify
from continual.tuning import Command, Tuning
from continual.tuning.command import parse
from tests.helpers import models, services
from tests.helpers.command import machine, run
from tests.helpers.preloaded import Process

pytestmark = pytest.mark.slow

SCRIPT = """
import array, json, pathlib, shutil, sys
def weights(place):
    data = pathlib.Path(place, "model.safetensors").read_bytes()
    return array.array("f", data[8 + int.from_bytes(data[:8], "little") :])
target, model, seen = sys.argv[1:]
far = sum((a - b) ** 2 for a, b in zip(weights(target), weights(model), strict=True)) ** 0.5
number = len(list(pathlib.Path(seen).iterdir()))
shutil.copytree(model, pathlib.Path(seen, f"{number:02}"))
print("progress 1\\nprogress 2", file=sys.stderr)
print("loading")
print(json.dumps({"results": {"far": far, "near": -far}}))
print()
"""
BEST = 0.45


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A state of two folds, and beside it the export at the best scale, a script that knows it, and a directory for
    scratch files."""
    base = models.base(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    making.init(base, tmp_path / "state", making.Recipe(rule="opcm", scale="norm"))
    with api.open(tmp_path / "state", write=True) as merge:
        for i in range(2):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{i}", i))
        folder.export(
            merge.base,
            merge.reading(options=ReadOptions("number", BEST)),
            Target(tmp_path / "target"),
            merge.executor,
            quiet,
        )
    (tmp_path / "eval.py").write_text(SCRIPT)
    (tmp_path / "seen").mkdir()
    (tmp_path / "work").mkdir()
    return tmp_path


def quiet(_stage: str, _done: int, _total: int) -> None:
    pass


def command(place: Path, **more: object) -> Command:
    argv = (sys.executable, "-S", str(place / "eval.py"), str(place / "target"), "{model}", str(place / "seen"))
    return Command(argv, **{"key": "results.near", **more})  # type: ignore[arg-type]


def asked(place: Path, **more: object) -> Tuning:
    return Tuning(**{"candidates": 9, "work": place / "work", **more})  # type: ignore[arg-type]


def test_the_best_is_found_recorded_and_used(place: Path) -> None:
    with api.open(place / "state", write=True) as merge:
        head, generations, heard = merge.state.ledger.head, merge.state.generations(), []
        tuned = merge.tune(
            command(place), asked(place, policy="number"), told=lambda options, score: heard.append((options, score))
        )
        assert merge.state.ledger.head.seq == head.seq + 1
        assert merge.state.generations() == generations
        assert merge.state.ledger.head.generation == head.generation
        entry = tuned.entry
        assert len(entry.trials) == len(heard) == len(list((place / "seen").iterdir())) == 9
        assert tuned.read.value == pytest.approx(BEST, rel=0.1)
        assert tuned.score > tuned.before == heard[0][1] == entry.before.score
        assert heard[0][0].value == pytest.approx(merge.reading(head.seq).factor()), (
            "what was in force, in the policy asked for"
        )
        assert entry.folds == 2
        assert entry.evaluation.command[-2:] == ("{model}", str(place / "seen"))
        assert list((place / "work").iterdir()) == []
        # every candidate was what an export is, bit for bit
        for number, (options, _) in enumerate(heard):
            out, given = place / f"out-{number}", place / "seen" / f"{number:02}"
            folder.export(merge.base, merge.reading(options=options), Target(out), merge.executor, quiet)
            names = sorted(p.name for p in out.iterdir())
            assert (
                names
                == sorted(p.name for p in given.iterdir())
                == ["config.json", "continual.json", "model.safetensors", "tokenizer.json"]
            )
            assert filecmp.cmp(out / "model.safetensors", given / "model.safetensors", shallow=False)
        exported = merge.export(Target(place / "now"))
        of_best = place / "seen" / f"{[t.score for t in entry.trials].index(tuned.score):02}"
        assert filecmp.cmp(exported / "model.safetensors", of_best / "model.safetensors", shallow=False)
    with api.open(place / "state") as merge:
        assert merge.reading().options == tuned.read
        assert merge.state.ledger.head.of_kind(TuneEntry).own() == tuned.entry.own()
        assert verify(merge.state) == []


def test_going_back_to_what_was_tuned(place: Path) -> None:
    with api.open(place / "state", write=True) as merge:
        with pytest.raises(Misconfigured, match="run 'continual tune' first"):
            merge.rescale("tuned")
        start = merge.reading().options
        tuned = merge.tune(command(place), asked(place))
        assert tuned.commit is not None
        for away in (("norm:2", None), ("auto", None), (None, "0.5:0.5")):
            merge.rescale(*away)
            assert tuning.in_force(merge.state) is None
            merge.rescale("tuned")
            assert merge.reading().options == tuned.read
            assert tuning.in_force(merge.state) == tuned.commit
        seq = merge.state.ledger.head.seq
        merge.rescale("tuned")
        assert merge.state.ledger.head.seq == seq, "it was in force"
        assert merge.rescale("norm") == start
        merge.rescale("tuned", "0.5:0.5")
        assert tuning.in_force(merge.state) is None
    told = machine("scale", "tuned", "--state", place / "state")
    assert told == {"policy": "norm", "value": tuned.read.value}
    status = machine("status", "--state", place / "state")
    assert status["tuned"] == {"record": tuned.commit.seq, "folds": 2}
    assert (
        f"(tuned at record {tuned.commit.seq}, when 2 were folded)" in run("status", "--state", place / "state").stdout
    )
    assert run("init", place / "base", "--scale", "tuned", "--state", place / "other").returncode == 2
    assert "continual tune" in run("init", place / "base", "--scale", "tuned", "--state", place / "other").stderr


@pytest.mark.parametrize("policy", ["norm", "number"])
def test_a_rule_whose_length_has_to_be_measured(place: Path, policy: str) -> None:
    making.init(place / "base", place / "max", making.Recipe(rule="magmax", scale="norm"))
    with api.open(place / "max", write=True) as merge:
        for i in range(2):
            merge.fold(place / f"ft-{i}")
        stages = set()
        tuned = merge.tune(
            command(place), asked(place, policy=policy, candidates=5), lambda stage, _d, _t: stages.add(stage)
        )
        assert tuned.read.policy == policy
        assert {"measure", "tune", "export"} <= stages
        best = [t.score for t in tuned.entry.trials].index(tuned.score)
        out = merge.export(Target(place / "now"))
    assert filecmp.cmp(out / "model.safetensors", place / "seen" / f"{best:02}" / "model.safetensors", shallow=False)


@pytest.mark.parametrize("policy", [None, "number", "norm"])
def test_spread_scales_matrices_and_the_rest_apart(place: Path, policy: str | None) -> None:
    with api.open(place / "state", write=True) as merge:
        merge.rescale("spread:0.4")
        tuned = merge.tune(command(place), asked(place, policy=policy, candidates=5))
        trials = tuned.entry.trials
        assert trials[0].scale == "spread:0.4", "no number says the same"
        kinds = {ReadOptions.parse(t.scale).policy for t in trials[1:]}
        assert kinds == {policy or "spread"}
        best = [t.score for t in trials].index(tuned.score)
        out = merge.export(Target(place / "now"))
    assert filecmp.cmp(out / "model.safetensors", place / "seen" / f"{best:02}" / "model.safetensors", shallow=False)
    making.init(place / "base", place / "max", making.Recipe(rule="magmax"))
    with api.open(place / "max", write=True) as merge:
        merge.fold(place / "ft-0")
        with pytest.raises(Misconfigured, match="spread"):
            merge.tune(command(place), asked(place, policy="spread"))


def test_lower_lines_and_around(place: Path) -> None:
    with api.open(place / "state", write=True) as merge:
        tuned = merge.tune(
            command(place, key="results.far", lower=True),
            asked(place, policy="number", lines=True, around=0.5, candidates=12),
        )
        trials = tuned.entry.trials
        assert len(trials) == 12
        assert sum(t.lines is not None for t in trials) == 4
        assert tuned.score == min(t.score for t in trials)
        assert trials[1].scale == "0.5"
        assert tuned.entry.evaluation.lower is True


def test_an_open_state_is_tuned_dry_and_one_that_moves_on_not_at_all(place: Path) -> None:
    line = f"{sys.executable} -S '{place}/eval.py' {place}/target {{model}} {place}/seen"
    flags = ("tune", "--command", line, "--key", "results.near", "--candidates", 3, "--state", place / "state")
    with api.open(place / "state", write=True) as merge:
        busy = run(*flags)
        assert busy.returncode == 5
        assert str(os.getpid()) in busy.stderr
        dry = machine(*flags, "--dry-run")
        assert (len(dry["trials"]), dry["record"]) == (3, None)
        seq = merge.state.ledger.head.seq
        models.fine_tune(place / "base", place / "late", 9)
        with pytest.raises(Retry, match="changed the merge"):
            merge.tune(
                command(place), asked(place, candidates=3), told=lambda _o, _s: merge.fold(place / "late") and None
            )
        assert [c.entry.kind for c in merge.state.ledger.log[seq + 1 :]] == ["fold"]
        merge.rescale("norm:1.2")
    done = run(*flags, "--lines")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 3
    assert "in force" in done.stdout
    assert "recorded as record" in done.stdout


COMPLAINS = "import sys; print('first', file=sys.stderr); print('out of luck', file=sys.stderr); sys.exit(3)"


@pytest.mark.parametrize(
    ("script", "more", "kind", "words"),
    [
        (COMPLAINS, {}, Misconfigured, "exit code 3, last line of stderr: out of luck"),
        ("import os; os.kill(os.getpid(), 9)", {}, Retry, "killed by signal 9"),
        ("import time; time.sleep(600)", {"timeout": 0.3}, Retry, "not done after 0.3 s"),
        ("print('accuracy: 0.5')", {}, Misconfigured, "its last line is no number but 'accuracy: 0.5'"),
        ("print('nan')", {}, Misconfigured, "no finite number"),
        ("pass", {}, Misconfigured, "it printed nothing"),
        ("print('{\"a\": 1}')", {}, Misconfigured, "name the number in it with --key"),
        ("print('{\"a\": 1}')", {"key": "a.b"}, Misconfigured, "no a.b in its last line"),
        ("print('{\"a\": true}')", {"key": "a"}, Misconfigured, "is no number but True"),
    ],
)  # fmt: skip
def test_a_command_that_fails_is_named_and_nothing_is_recorded(
    place: Path, script: str, more: dict[str, object], kind: type[Exception], words: str
) -> None:
    with api.open(place / "state", write=True) as merge:
        head = merge.state.ledger.head
        command = Command((sys.executable, "-S", "-c", script, "{model}"), **more)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^candidate norm:1\.0: ") as caught:
            merge.tune(command, asked(place))
        assert words in str(caught.value)
        assert sys.executable in str(caught.value)
        assert merge.state.ledger.head == head
        assert list((place / "work").iterdir()) == []


def test_what_cannot_be_begun(place: Path) -> None:
    with pytest.raises(Misconfigured, match=r"write \{model\} where"):
        Command(("eval.py", "model"))
    with pytest.raises(Misconfigured, match="No closing quotation"):
        Command.split("eval.py '{model}")
    with pytest.raises(Misconfigured, match="seconds above 0"):
        Command(("{model}",), timeout=0)
    with pytest.raises(Misconfigured, match="no such directory"):
        Tuning(work=place / "nowhere")
    with pytest.raises(Misconfigured, match="at least 3"):
        Tuning(candidates=2)
    with pytest.raises(Misconfigured, match="use one of"):
        Tuning(policy="best")  # type: ignore[arg-type]
    with pytest.raises(Retry, match="tuning needs"):
        room(place, 1 << 60, "tuning")
    making.init(place / "base", place / "empty")
    with api.open(place / "empty", write=True) as merge, pytest.raises(Misconfigured, match="nothing is folded yet"):
        merge.tune(command(place))
    with api.open(place / "state", write=True) as merge:
        with pytest.raises(Misconfigured, match="cannot be started"):
            merge.tune(Command((str(place / "no-such-program"), "{model}")), asked(place))
        merge.rescale("0")
        with pytest.raises(Misconfigured, match="say where with --around"):
            merge.tune(command(place), asked(place))
        tuned = merge.tune(command(place), asked(place, around=1.0))
        assert tuned.entry.before.scale == "0.0"
        assert tuned.read.value == pytest.approx(BEST, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--command"),
        (("--command", "e {model}", "--rows", "r"), "--command"),
        (("--rows", "r"), "--objective"),
        (("--command", "e {model}", "--heads", "h"), "--heads"),
        (("--rows", "r", "--objective", "causal-lm", "--lower"), "--lower"),
        (("--rows", "r", "--objective", "best"), "causal-lm"),
        (("--rows", "r", "--objective", "heads"), "--heads"),
        (("--command", "e"), "{model}"),
    ],
)
def test_flags_that_do_not_go_together(place: Path, flags: tuple[str, ...], words: str) -> None:
    done = run("tune", *flags, "--state", place / "state")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr


def test_a_score_is_read_from_a_line() -> None:
    assert parse("0.25", None) == 0.25
    assert parse("-1e3", None) == -1000.0
    assert parse('{"a": {"b": 3}}', "a.b") == 3.0
    for line, key in (("inf", None), ('{"a": NaN}', "a"), ("[1]", "a"), ('{"a": "1"}', "a"), ("", "a"), ("x", "a")):
        with pytest.raises(ValueError, match=r"\w"):
            parse(line, key)


def test_a_termination_stops_the_command_and_leaves_nothing(place: Path) -> None:
    script = "import os, pathlib, sys, time; pathlib.Path(sys.argv[2]).write_text(str(os.getpid())); time.sleep(600)"
    line = f'{sys.executable} -S -c "{script}" {{model}} {place}/pid'
    with Process("tune", "--state", place / "state", "--work", place / "work", "--command", line) as process:
        pid = int(
            services.until(lambda: (place / "pid").exists() and (place / "pid").read_text(), "a candidate is evaluated")
        )
        assert len(list((place / "work").iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(services.LIMIT) == 128 + signal.SIGTERM
    assert list((place / "work").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_daemon_shows_the_scale_and_where_it_is_from(place: Path) -> None:
    making.init(place / "base", place / "max", making.Recipe(rule="magmax", scale="norm"))
    with api.open(place / "max", write=True) as merge:
        for i in range(2):
            merge.fold(place / f"ft-{i}")
        tuned = merge.tune(command(place), asked(place, candidates=3))
    with services.daemon(place / "max", place / "seen", "--current", str(place / "published")) as process:
        address = services.url(process, place / "max")
        services.until((place / "published").exists, "the export")
        factor = json.loads((place / "published/continual.json").read_text())["read"]["factor"]
        services.until(
            lambda: f"continual_scale_ratio {factor}" in services.get(f"{address}/metrics")[1],
            "the ratio that was measured",
        )
        assert "continual_scale_tuned_folds 2.0" in services.get(f"{address}/metrics")[1]
        assert (
            f"(tuned at record {tuned.commit and tuned.commit.seq}, when 2 were folded)"
            in services.get(f"{address}/")[1]
        )


def test_a_path_of_the_scratch_file_that_cannot_be_is_named() -> None:
    with pytest.raises(Misconfigured, match=r"work = /x.*the path is too long"):
        Tuning(work="/" + "x" * 5000)
