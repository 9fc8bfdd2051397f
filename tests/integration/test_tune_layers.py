"""Coefficients of layers, learned on rows whose best coefficients are known: in both forms of state, under several
rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.objectives import Given
from continual.publish.folder import Target
from continual.publish.lora import LoraTarget
from continual.records import ObjectiveRecord
from continual.tuning import Learning, Tuning, Weighing
from tests.helpers import adapters, quadratic
from tests.helpers.command import machine, run

OBJECTIVE = "tests.helpers.quadratic:make"
JUDGE = round(quadratic.ROWS * 0.2)
WANTED = Learning(OBJECTIVE, calibration={"batch": quadratic.ROWS}, candidates=40)


def folded(place: Path, rule: str, *, kept: bool) -> api.Merge:
    """A state of three models, each of which goes a part of the way to what one task asks for."""
    base = quadratic.world(place)
    making.init(base, place / "state", making.Recipe(rule=rule, scale="0.3", width=64 if kept else None))
    merge = api.Merge(Settings(state=place / "state", device="cpu", max_base_ratio=100.0), write=True)
    for k, share in enumerate((0.2, 0.5, 0.8)):
        model = (
            quadratic.lora(base, k, f"a{k}", share=share) if kept else quadratic.good(base, k, f"good{k}", share=share)
        )
        assert merge.fold(model).fate == "folded"
    return merge


def exported(merge: api.Merge, where: Path) -> dict[str, torch.Tensor]:
    merge.export(Target(where, dtype="F32"))
    return load_file(where / "model.safetensors")


def loss(place: Path, weights: dict[str, torch.Tensor], *, judging: bool) -> float:
    """The mean loss of the rows that judge, or of those that drive, as the objective says it."""
    given = quadratic.make(place / "base", torch.device("cpu"))
    given.model.load_state_dict({name: weights[name] for name in given.model.state_dict()})
    order = torch.randperm(quadratic.ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    rows = order[:JUDGE] if judging else order[JUDGE:]
    with torch.no_grad():
        return sum(float(task.losses(rows).double().mean()) for task in given.tasks) / len(given.tasks)


@pytest.mark.parametrize(("rule", "kept"), [("iso-c", False), ("tsv-m", True)])
def test_they_are_learned_and_read_from_then_on(tmp_path: Path, rule: str, kept: bool) -> None:
    with folded(tmp_path, rule, kept=kept) as merge:
        base = load_file(tmp_path / "base" / "model.safetensors")
        start = exported(merge, tmp_path / "start")
        found = merge.tune_layers(WANTED)
        assert found.commit is not None
        assert merge.scale() == found.read
        layers = dict(found.read.layers)
        after = exported(merge, tmp_path / "after")
        for name, value in after.items():
            wanted = base[name] + layers.get(name, 1.0) * (start[name] - base[name])
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6), name
        assert -found.score == pytest.approx(loss(tmp_path, after, judging=True), rel=1e-4)
        assert -found.before == pytest.approx(loss(tmp_path, start, judging=True), rel=1e-4)
        trial = next(trial for trial in found.entry.trials if trial.score == found.score)
        assert trial.loss == pytest.approx(loss(tmp_path, after, judging=False), rel=1e-4)
        least = lowest(tmp_path, base, start)
        if kept:
            written = merge.export_lora(LoraTarget(tmp_path / "thin", None)).directory
            thin = adapters.task_vectors(tmp_path / "base", written)[0]
            assert all(torch.allclose(thin[name], after[name] - base[name], atol=1e-5) for name in thin)
            assert thin
        losses = [trial.loss or 0.0 for trial in found.entry.trials]
        assert min(losses) - least < 0.2 * (losses[0] - least), "near the least loss that there is"
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:  # and from the record
        assert merge.scale() == found.read
        assert "coefficients of" in str(merge.scale())
        assert merge.rescale("0.5").layers == found.read.layers, "another scale leaves them"
        assert merge.rescale("auto").layers == ()
        assert merge.rescale("tuned") == found.read
        assert merge.scale(view=ReadView(scale="0.3")).layers == found.read.layers
        if kept:
            assert merge.scale(view=ReadView(rule="mean")).layers == (), "of another rule they say nothing"
            assert merge.explain().models


def lowest(place: Path, base: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """The least loss of the rows that drive which coefficients not below 0 can give: by many small exact steps."""
    given = quadratic.make(place / "base", torch.device("cpu"))
    order = torch.randperm(quadratic.ROWS, generator=torch.Generator().manual_seed(0)).tolist()[JUDGE:]
    names = sorted(base)
    sizes = [base[name].numel() for name in names]
    along, left = [], []
    for task in given.tasks:
        assert isinstance(task, quadratic.Rows)
        signs = task.signs[order].double()
        change = torch.cat([(start[name] - base[name]).flatten().double() for name in names])
        along.append(torch.stack([part.sum(1) for part in (signs * change).split(sizes, 1)], 1))
        left.append(task.wanted[order].double() - signs @ quadratic.flat(base).double())
    a, b = torch.cat(along), torch.cat(left)
    coefficients = torch.ones(len(names), dtype=torch.float64)
    for _ in range(100):
        for place_ in range(len(names)):
            column = a[:, place_]
            if bool(column.any()):
                rest = b - a @ coefficients + column * coefficients[place_]
                coefficients[place_] = max(0.0, float(column @ rest / (column @ column)))
    return float(0.5 * (a @ coefficients - b).square().mean())


def test_a_run_is_repeated_bit_by_bit_and_another_seed_deals_other_rows(tmp_path: Path) -> None:
    with folded(tmp_path, "iso-c", kept=False) as merge:
        dry = replace(WANTED, candidates=6, dry_run=True)
        once, again = merge.tune_layers(dry), merge.tune_layers(dry)
        assert replace(once.entry, seconds=0.0) == replace(again.entry, seconds=0.0)
        assert once.commit is None
        assert merge.scale().layers == ()
        told = once.entry.evaluation
        assert isinstance(told, ObjectiveRecord)
        assert (told.seed, told.held, told.objective, told.kind) == (0, 0.2, OBJECTIVE, "function")
        other = merge.tune_layers(replace(dry, calibration={**dry.calibration, "seed": 1}))
        assert other.before != once.before
        assert isinstance(other.entry.evaluation, ObjectiveRecord)
        assert other.entry.evaluation.digest != told.digest


class Opposed(quadratic.Rows):
    """A task whose rows that judge ask for what there is at the start."""

    def stay(self, weights: dict[str, torch.Tensor]) -> None:
        order = torch.randperm(quadratic.ROWS, generator=torch.Generator().manual_seed(0)).tolist()
        self.wanted[order[:JUDGE]] = (self.signs @ quadratic.flat(weights))[order[:JUDGE]]


def opposed(directory: Path, device: torch.device) -> Given:
    given = quadratic.make(directory, device)
    now = load_file(directory.parent / "start" / "model.safetensors")
    tasks: Sequence[Opposed] = given.tasks  # type: ignore[assignment]
    for task in tasks:
        Opposed.stay(task, now)
    return given


def test_what_serves_the_rows_that_judge_worse_is_not_recorded(tmp_path: Path) -> None:
    with folded(tmp_path, "iso-c", kept=False) as merge:
        exported(merge, tmp_path / "start")
        head, scale = merge.state.ledger.head.seq, merge.scale()
        found = merge.tune_layers(replace(WANTED, objective="tests.integration.test_tune_layers:opposed"))
        assert found.commit is None
        assert found.score == found.before
        assert found.read == scale == merge.scale()
        assert merge.state.ledger.head.seq == head
        losses = [trial.loss for trial in found.entry.trials]
        assert min(losses[1:]) < losses[0], "the rows that drive would have gone on"
        assert len(losses) == 6, "five candidates that do not serve better end it"


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    folded(tmp_path, "tsv-m", kept=True).close()
    where = ("--state", tmp_path / "state")
    flags = (
        "tune",
        "--device",
        "cpu",
        "--what",
        "layers",
        "--objective",
        OBJECTIVE,
        "--candidates",
        5,
        "--batch",
        quadratic.ROWS,
    )
    dry = machine(*flags, "--calibration", "held=0.25", "--dry-run", *where)
    assert dry["record"] is None
    assert dry["evaluation"]["held"] == 0.25
    assert dry["read"]["layers"]
    done = run(*flags, *where)
    assert done.returncode == 0, done.stderr
    assert "coefficients of" in done.stdout
    assert "layers: loss of the rows that judge " in done.stdout
    assert "recorded as record 4" in done.stdout
    assert machine("scale", *where)["layers"] != {}
    assert "coefficients of" in run("status", *where).stdout
    assert run("tune", "--what", "layers", "--command", "eval {model}", *where).returncode == 2
    assert run(*flags, "--lines", *where).returncode == 2
    assert run("tune", "--calibration", "seed=1", "--command", "eval {model}", *where).returncode == 2


def test_what_cannot_be_learned_is_said(tmp_path: Path) -> None:
    base = quadratic.world(tmp_path)
    making.init(base, tmp_path / "state", making.Recipe())
    with api.Merge(Settings(state=tmp_path / "state", device="cpu"), write=True) as merge:
        with pytest.raises(Misconfigured, match="nothing is folded yet"):
            merge.tune_layers(WANTED)
        with pytest.raises(Misconfigured, match="take at least"):
            Learning(OBJECTIVE, candidates=2)
        for wanted in (partial(Learning, OBJECTIVE), Weighing, Tuning):
            with pytest.raises(Misconfigured, match="no such directory"):
                wanted(work=tmp_path / "gone")
        with pytest.raises(Misconfigured, match="needs a JSONL file"):
            Learning("heads")
        with pytest.raises(Misconfigured, match=r"calibration|sed"):
            Learning(OBJECTIVE, calibration={"sed": 1})
