"""A coefficient for each model in each layer, learned on rows whose best is known: in both forms of state, under
several rules; and what becomes of them when models come and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.contract import silent
from continual.publish.folder import Target
from continual.publish.lora import LoraTarget
from continual.rules import TermFactors
from continual.state.entries import ScaleEntry
from continual.tuning import Learning
from tests.helpers import adapters, models, quadratic
from tests.helpers.command import machine, run
from tests.integration.test_tune_layers import OBJECTIVE, exported, folded, loss

WANTED = Learning(OBJECTIVE, calibration={"batch": quadratic.ROWS}, candidates=40, models=True)
FLAGS = ("tune", "--device", "cpu", "--what", "models-layers", "--objective", OBJECTIVE, "--batch", quadratic.ROWS)


def read_with(merge: api.Merge, terms: TermFactors) -> None:
    """Records these coefficients."""
    merge.state.record(ScaleEntry(read=replace(merge.scale(), terms=terms, layers=()).to_mapping(), message="by hand"))


def keys(merge: api.Merge) -> list[str]:
    """Of the models, as they were folded."""
    return [fold.entry.candidate.key for fold in merge.state.ledger.folds()]


def even(merge: api.Merge, factor: float) -> TermFactors:
    """One coefficient for all."""
    layers = tuple(sorted(layer.name for layer in merge.state.format.layers))
    return TermFactors(layers, tuple((key, (factor,) * len(layers)) for key in sorted(keys(merge))))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("task-arithmetic", True), ("tsv-m", True), ("tsv-flow", True), ("tsv-m", False), ("tsv-flow", False)],
)
def test_they_are_learned_and_read_from_then_on(tmp_path: Path, rule: str, kept: bool) -> None:
    with folded(tmp_path, rule, kept=kept) as merge:
        if kept:  # no two of the others touch one layer
            assert merge.fold(quadratic.lora(tmp_path / "base", None, "noise", seed=5)).fate == "folded"
        base = load_file(tmp_path / "base" / "model.safetensors")
        start = exported(merge, tmp_path / "start")
        fewer = merge.tune_layers(replace(WANTED, models=False, dry_run=True))
        found = merge.tune_layers(WANTED)
        assert found.commit is not None
        assert merge.scale() == found.read
        after = exported(merge, tmp_path / "after")
        assert -found.score == pytest.approx(loss(tmp_path, after, judging=True), rel=1e-3)
        assert -found.before == pytest.approx(loss(tmp_path, start, judging=True), rel=1e-3)
        trial = next(trial for trial in found.entry.trials if trial.score == found.score)
        assert trial.loss == pytest.approx(loss(tmp_path, after, judging=False), rel=1e-3)
        assert min(t.loss or 0.0 for t in found.entry.trials) < 0.9 * min(t.loss or 0.0 for t in fewer.entry.trials)
        assert [key for key, _ in found.read.terms.models] == sorted(keys(merge))
        if kept and rule == "task-arithmetic":  # the sum of what each adapter is, times its own number
            expected = {name: base[name].clone() for name in base}
            for fold in merge.state.ledger.folds():
                mine = found.read.terms.of(fold.entry.candidate.key)
                for name, tau in adapters.task_vectors(tmp_path / "base", Path(fold.entry.candidate.origin))[0].items():
                    expected[name] += 0.3 * mine.get(name, 1.0) * tau
            assert all(torch.allclose(after[name], expected[name], atol=1e-5) for name in base)
        if kept:
            assert found.read.layers == ()
            written = merge.export_lora(LoraTarget(tmp_path / "thin", None)).directory
            thin = adapters.task_vectors(tmp_path / "base", written)[0]
            assert thin
            assert all(torch.allclose(thin[name], after[name] - base[name], atol=1e-5) for name in thin)
            assert merge.explain().models
        else:  # of what is no matrix a state of whole tensors has the mean alone
            plain = {name for name, _ in found.read.layers}
            assert plain
            assert not plain & {*found.read.terms.layers}
        scratch = merge.tune_layers(replace(WANTED, models=False, dry_run=True, candidates=3))
        assert scratch.before == pytest.approx(found.score, rel=1e-4), "a coefficient a layer begins at what is read"
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:  # and from the record
        assert merge.scale() == found.read
        assert f"coefficients of {4 if kept else 3} models in" in str(merge.scale())
        assert merge.rescale("0.5").terms == found.read.terms, "another scale leaves them"
        assert not merge.rescale("auto").terms
        assert merge.rescale("tuned") == found.read
        assert not merge.scale(view=ReadView(rule="esm")).terms, "of another rule they say nothing"


def test_a_run_is_repeated_bit_by_bit(tmp_path: Path) -> None:
    with folded(tmp_path, "tsv-m", kept=True) as merge:
        dry = replace(WANTED, candidates=6, dry_run=True)
        once, again = merge.tune_layers(dry), merge.tune_layers(dry)
        assert replace(once.entry, seconds=0.0) == replace(again.entry, seconds=0.0)
        assert once.read.terms
        assert once.commit is None
        assert not merge.scale().terms


@pytest.mark.parametrize("kept", [True, False])
def test_batches_of_rows_say_what_all_of_them_say(tmp_path: Path, kept: bool) -> None:
    with folded(tmp_path, "tsv-flow", kept=kept) as merge:
        dry = replace(WANTED, candidates=6, dry_run=True)
        once, few = (
            merge.tune_layers(replace(dry, calibration={"batch": batch})).entry.trials for batch in (quadratic.ROWS, 3)
        )
        assert [t.loss for t in few] == pytest.approx([t.loss for t in once], rel=1e-4)
        assert [t.score for t in few] == pytest.approx([t.score for t in once], rel=1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_models_come_and_go(tmp_path: Path, kept: bool) -> None:
    with folded(tmp_path, "tsv-m", kept=kept) as merge:
        base = load_file(tmp_path / "base" / "model.safetensors")
        plain, before = exported(merge, tmp_path / "plain"), merge.reading()
        read_with(merge, even(merge, 2.0))
        twice, now = exported(merge, tmp_path / "twice"), merge.reading()
        for reading in (before, now):
            reading.settle(merge.executor, silent)
        for spec in merge.state.format.tensors:  # an export takes from an earlier one what is made from the same
            same = torch.equal(plain[spec.name], twice[spec.name])
            assert (before.made_from(spec) == now.made_from(spec)) <= same, spec.name
        matrices = [spec.name for spec in merge.state.format.tensors if spec.kind == "matrix"]
        for name in matrices:
            assert torch.allclose(twice[name] - base[name], 2 * (plain[name] - base[name]), rtol=1e-4, atol=1e-5), name
        gone = merge.state.ledger.folds()[0].entry.candidate
        base_of, far = tmp_path / "base", 9
        new = quadratic.lora(base_of, None, "new", seed=far) if kept else quadratic.good(base_of, 1, "new", seed=far)
        assert merge.fold(new).fate == "folded"
        read, two = exported(merge, tmp_path / "with"), merge.scale().terms
        new_key = keys(merge)[-1]
        merge.state.record(ScaleEntry(read=replace(merge.scale(), terms=TermFactors()).to_mapping(), message="none"))
        without = exported(merge, tmp_path / "without")
        half = TermFactors(two.layers, (*two.models, (new_key, (2.0,) * len(two.layers))))
        read_with(merge, half)
        all_twice = exported(merge, tmp_path / "all")
        for name in matrices:  # the new one's term counts once, those of the others twice
            both, one = all_twice[name] - base[name], without[name] - base[name]
            assert torch.allclose(both, 2 * one, rtol=1e-4, atol=1e-5), name
        assert any(not torch.allclose(read[n], all_twice[n], atol=1e-4) for n in matrices)
        assert any(not torch.allclose(read[n], without[n], atol=1e-4) for n in matrices)
        read_with(merge, two)
        merge.unfold(merge.look_unfold(gone.name))
        assert merge.scale().terms == two, "what is said of a model that is gone stays, and says nothing"
        left = exported(merge, tmp_path / "left")
        read_with(merge, TermFactors(two.layers, tuple(one for one in two.models if one[0] != gone.key)))
        again = exported(merge, tmp_path / "again")
        assert all(torch.equal(left[name], again[name]) for name in left)


def test_a_stack_of_experts_reads_by_them(tmp_path: Path) -> None:
    shapes = {"layers.0.experts.gate_up": (3, 8, 12), "layers.0.proj.weight": (12, 16)}
    base = models.base(tmp_path / "base", shapes=shapes)
    making.init(base, tmp_path / "state", making.Recipe(rule="tsv-m", scale="0.5"))
    with api.Merge(Settings(state=tmp_path / "state", device="cpu", max_base_ratio=100.0), write=True) as merge:
        for k in range(2):
            assert merge.fold(models.fine_tune(base, tmp_path / f"m{k}", k, size=0.5)).fate == "folded"
        origin, plain = load_file(base / "model.safetensors"), exported(merge, tmp_path / "plain")
        one, other = sorted(keys(merge))
        for first, second in ((2.0, 2.0), (1.0, 3.0), (3.0, 1.0)):
            read_with(merge, TermFactors(tuple(sorted(shapes)), ((one, (first,) * 2), (other, (second,) * 2))))
            found = exported(merge, tmp_path / f"x{first}{second}")
            if first == second:
                for name in shapes:
                    assert torch.allclose(found[name] - origin[name], 2 * (plain[name] - origin[name]), atol=1e-5), name
                total = {name: torch.zeros_like(found[name]) for name in shapes}
            else:
                total = {name: total[name] + found[name] - origin[name] for name in shapes}
        assert all(torch.allclose(total[name], 4 * (plain[name] - origin[name]), atol=1e-4) for name in shapes)


def test_what_has_no_terms_is_said(tmp_path: Path) -> None:
    with folded(tmp_path, "iso-c", kept=False) as merge:
        head = merge.state.ledger.head.seq
        with pytest.raises(
            Misconfigured,
            match=r"iso-c reads no sum .* whole tensors it is tsv-m, tsv-even, tsv-u, tsv-w, esm, tsv-flow that",
        ):
            merge.tune_layers(WANTED)
        with pytest.raises(Misconfigured, match="task-arithmetic reads no sum"):
            merge.tune_layers(replace(WANTED, rule="task-arithmetic"))
        assert merge.state.ledger.head.seq == head
    with folded(tmp_path / "more", "tsv-m", kept=True) as merge:
        with pytest.raises(Misconfigured, match=r"gram reads no sum .* adapters it is mean, task-arithmetic, tsv-m"):
            merge.tune_layers(replace(WANTED, rule="gram"))
        read_with(merge, even(merge, 2.0))
        trimmed = ReadView(options={"before": [{"name": "drop"}]}, rule="tsv-m")
        with pytest.raises(Misconfigured, match="tsv-m with transforms before it reads no sum"):
            merge.export(Target(tmp_path / "no"), view=trimmed)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    folded(tmp_path, "tsv-m", kept=True).close()
    where = ("--state", tmp_path / "state")
    dry = machine(*FLAGS, "--candidates", 5, "--dry-run", *where)
    assert dry["record"] is None
    assert set(dry["read"]["terms"]) == {"layers", "models"}
    taught = machine(*FLAGS, "--candidates", 4, "--dry-run", "--rule", "task-arithmetic", *where)
    assert taught["read"]["rule"] == "task-arithmetic"
    done = run(*FLAGS, "--candidates", 5, *where)
    assert done.returncode == 0, done.stderr
    assert "coefficients of 3 models in" in done.stdout
    assert "recorded as record 4" in done.stdout
    assert machine("scale", *where)["terms"]["models"] != {}
    assert "coefficients of 3 models in" in run("status", *where).stdout
    refused = run(*FLAGS, "--rule", "iso-c", *where)
    assert refused.returncode == 2
    assert "models have no coefficients of their own" in refused.stderr
