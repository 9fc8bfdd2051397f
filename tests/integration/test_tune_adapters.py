"""Tuning of states of adapters: of the scale, and of the weights of models, by a command that reads the files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.publish.folder import Target
from continual.tuning import Command, Tuning, Weighing
from tests.helpers import adapters, models
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow

SCRIPT = """
import array, pathlib, sys
def weights(place):
    data = pathlib.Path(place, "model.safetensors").read_bytes()
    return array.array("f", data[8 + int.from_bytes(data[:8], "little") :])
print(-sum((a - b) ** 2 for a, b in zip(weights(sys.argv[1]), weights(sys.argv[2]), strict=True)) ** 0.5)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "eval.py").write_text(SCRIPT)
    return models.base(tmp_path / "base")


def folded(tmp_path: Path, base: Path, rule: str) -> api.Merge:
    """A state of three adapters, open for writing."""
    making.init(base, tmp_path / "state", making.Recipe(rule=rule, width=64))
    merge = api.Merge(Settings(state=tmp_path / "state", max_base_ratio=100.0), write=True)
    for seed, name in enumerate("abc"):
        assert merge.fold(adapters.lora(tmp_path / name, base, seed)).fate == "folded"
    return merge


def near(tmp_path: Path, merge: api.Merge, view: ReadView) -> Command:
    """A command whose score is how near a model is to what `view` reads."""
    merge.export(Target(tmp_path / "target", dtype="F32"), view=view)
    return Command((sys.executable, "-S", str(tmp_path / "eval.py"), str(tmp_path / "target"), "{model}"))


@pytest.mark.parametrize("rule", ["tsv-m", "task-arithmetic", "ties"])
def test_the_scale_is_found(tmp_path: Path, base: Path, rule: str) -> None:
    with folded(tmp_path, base, rule) as merge:
        command = near(tmp_path, merge, ReadView(scale="0.45"))
        found = merge.tune(command, Tuning(16, "number", around=0.3))
        assert found.read.policy == "number"
        assert found.read.value == pytest.approx(0.45, rel=0.05)
        assert found.score > found.before
        assert merge.scale() == found.read
        merge.export(tmp_path / "tuned")
        read, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "target"))
        start = load_file(base / "model.safetensors")
        far = sum(float((read[name] - wanted[name]).square().sum()) for name in start) ** 0.5
        assert far == pytest.approx(-found.score, rel=1e-3, abs=1e-6), "what is exported is what was evaluated"
        assert far < 0.05 * sum(float((start[name] - wanted[name]).square().sum()) for name in start) ** 0.5


def test_the_scale_under_spread_is_found_around_what_is_in_force(tmp_path: Path, base: Path) -> None:
    with folded(tmp_path, base, "iso-c") as merge:
        command = near(tmp_path, merge, ReadView(scale="spread:0.6"))
        found = merge.tune(command, Tuning(12))
        assert found.read.policy == "spread"
        assert found.read.value == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize("rule", ["task-arithmetic", "tsv-m"])
def test_the_weights_are_found_and_read_from_then_on(tmp_path: Path, base: Path, rule: str) -> None:
    with folded(tmp_path, base, rule) as merge:
        merge.rescale("1")
        command = near(tmp_path, merge, ReadView(weights={"a": 0.3, "b": 2.0}))
        plain = {fold.entry.candidate.key: fold.entry.candidate.name for fold in merge.state.ledger.folds()}
        found = merge.tune_weights(command, Weighing(40))
        weights = {plain[key]: weight for key, weight in found.read.weights}
        assert weights == pytest.approx({"a": 0.3, "b": 2.0, "c": 1.0}, rel=0.15)
        assert found.score > 0.2 * found.before
        assert found.entry.before.weights == dict.fromkeys(plain, 1.0)
        assert len(found.entry.trials) <= 40
        assert merge.scale() == found.read
        merge.export(tmp_path / "tuned")
        read, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "target"))
        far = sum(float((read[name] - wanted[name]).square().sum()) for name in read) ** 0.5
        assert far == pytest.approx(-found.score, rel=1e-3, abs=1e-6), "what is exported is what was evaluated"
        assert {one.name: one.weight for one in merge.explain().models} == pytest.approx(weights)
        only = ReadView(weights={"a": 5.0})
        assert {one.name: one.weight for one in merge.explain(only).models} == pytest.approx({**weights, "a": 5.0})
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:  # and from the record
        assert merge.scale() == found.read
        assert merge.rescale("0.5").weights == found.read.weights, "another scale leaves them"
        assert merge.rescale("auto").weights == ()
        assert merge.rescale(rule="iso-c").weights == ()
        assert merge.rescale("tuned") == found.read
        merge.unfold(merge.look_unfold("b"))
        assert {one.name for one in merge.explain().models} == {"a", "c"}


def test_groups_share_a_factor(tmp_path: Path, base: Path) -> None:
    with folded(tmp_path, base, "mean") as merge:
        command = near(tmp_path, merge, ReadView(weights={"a": 4.0, "b": 4.0}))
        found = merge.tune_weights(command, Weighing(12, (("a", "b"),), dry_run=True))
        assert found.commit is None
        assert merge.scale().weights == ()
        assert sorted(weight for _, weight in found.read.weights) == pytest.approx([1.0, 4.0, 4.0], rel=0.2)
        with pytest.raises(Misconfigured, match="a is in another group already"):
            merge.tune_weights(command, Weighing(12, (("a", "b"), ("?",))))
        with pytest.raises(Misconfigured, match="3 weights take at least 7"):
            merge.tune_weights(command, Weighing(6))
        with pytest.raises(Misconfigured, match="opcm reads every model with weight 1"):
            merge.tune_weights(command, Weighing(rule="opcm"))


def test_the_command(tmp_path: Path, base: Path) -> None:
    with folded(tmp_path, base, "mean") as merge:
        argv = near(tmp_path, merge, ReadView(weights={"a": 3.0})).argv
    where = ("--state", tmp_path / "state", "--command", shlex.join(argv))
    done = run("tune", "--what", "weights", "--candidates", 9, *where)
    assert done.returncode == 0, done.stderr
    assert "weights of 3 models" in done.stdout
    assert "9 candidates" in done.stdout
    body = machine("scale", "--state", tmp_path / "state")
    assert len(body["weights"]) == 3
    assert run("tune", "--group", "a", *where).returncode == 2
    assert run("tune", "--what", "weights", "--lines", *where).returncode == 2


def test_a_merge_of_whole_tensors_is_weighed_as_it_is_folded(tmp_path: Path, base: Path) -> None:
    making.init(base, tmp_path / "dense", making.Recipe())
    with (
        api.Merge(Settings(state=tmp_path / "dense")) as merge,
        pytest.raises(Misconfigured, match="continual init --adapters"),
    ):
        merge.tune_weights(Command(("true", "{model}")))
