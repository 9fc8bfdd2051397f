"""What tells two merges apart: the figures are those of the task vectors, of records and of files, in both forms of a
state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.engine.comparing import DiffFigures
from continual.errors import Misconfigured
from tests.helpers import adapters, models
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


@pytest.fixture
def state(tmp_path: Path, base: Path) -> Path:
    """Two models, a tag, one more model, the first taken out, another scale."""
    making.init(base, tmp_path / "state", making.Recipe("mean"))
    with api.open(tmp_path / "state", write=True) as merge:
        for number in range(2):
            assert merge.fold(models.fine_tune(base, tmp_path / f"ft-{number}", number)).fate == "folded"
        merge.state.tag("two")
        assert merge.fold(models.fine_tune(base, tmp_path / "ft-2", 2)).fate == "folded"
        merge.unfold(merge.look_unfold("ft-0"))
        merge.rescale("0.5")
    return tmp_path / "state"


def vectors(merge: api.Merge, at: int) -> dict[str, torch.Tensor]:
    return {spec.name: merge.read(spec.name, at=at).double() for spec in merge.state.format.tensors}


def figures(a: torch.Tensor, b: torch.Tensor) -> tuple[float, ...]:
    dot = float((a * b).sum() / (a.norm() * b.norm()))
    return float(a.norm()), float(b.norm()), float((b - a).norm()), float((b - a).norm() / a.norm()), dot


def shown(found: DiffFigures) -> tuple[float | None, ...]:
    return found.before, found.after, found.change, found.relative, found.cosine


def test_the_figures_are_those_of_the_task_vectors(state: Path) -> None:
    with api.open(state) as merge:
        found = merge.diff("two", "HEAD")
        before, after = vectors(merge, 2), vectors(merge, merge.head)
    for one in found.tensors:
        assert shown(one.figures) == pytest.approx(figures(before[one.name], after[one.name]), rel=1e-5)
        if one.kind == "matrix":
            change = after[one.name] - before[one.name]
            rank = float(change.norm() / torch.linalg.matrix_norm(change, 2)) ** 2
            assert one.figures.rank == pytest.approx(rank, rel=1e-3)
        else:
            assert one.figures.rank is None
    for layer in found.layers:
        inside = [name for name in before if name == layer.name or name.startswith(f"{layer.name}.")]
        assert inside
        whole = [torch.cat([each[name].flatten() for name in inside]) for each in (before, after)]
        assert shown(layer.figures) == pytest.approx(figures(*whole), rel=1e-5)
    names = [layer.name for layer in found.layers]
    assert names[0] == "model.embed_tokens.weight", "what stands before the first layer"
    assert names[1:3] == ["model.layers.0", "model.layers.1"]
    assert found.came is not None
    assert found.went is not None
    assert ([m.name for m in found.came], [m.name for m in found.went], found.weighed) == (["ft-2"], ["ft-0"], ())


def test_a_merge_is_equal_to_itself_and_to_its_export(tmp_path: Path, state: Path) -> None:
    with api.open(state) as merge:
        same = merge.diff("2", "two")
        out = merge.export(tmp_path / "out")
        export = merge.diff(str(out))
        tune = merge.diff(str(tmp_path / "ft-1"), "HEAD")
    assert (same.whole.change, same.whole.relative, same.whole.cosine) == (0.0, 0.0, 1.0)
    assert same.came == same.went == ()
    assert export.whole.relative == pytest.approx(0.0, abs=1e-5)
    assert (export.a_seq, export.came, export.went, export.weighed) == (None, (), (), ())
    assert (tune.came, tune.whole.cosine) == (None, pytest.approx(2**-0.5, abs=0.1))


def test_adapters_and_their_weights(tmp_path: Path, base: Path) -> None:
    making.init(base, tmp_path / "adapters", making.Recipe("mean", width=32))
    settings = Settings(state=tmp_path / "adapters", max_base_ratio=100.0, weights={"b": 2.0})
    with api.Merge(settings, write=True) as merge:
        for number, name in enumerate("ab"):
            assert merge.fold(adapters.lora(tmp_path / name, base, number)).fate == "folded"
        found = merge.diff("1", str(merge.export(tmp_path / "out")))
        before, after = vectors(merge, 1), vectors(merge, 2)
        whole = [torch.cat([value.flatten() for value in each.values()]) for each in (before, after)]
        assert shown(found.whole) == pytest.approx(figures(*whole), rel=1e-4)
        one = merge.diff(str(tmp_path / "a"), "1")
        assert one.whole.relative == pytest.approx(0.0, abs=1e-5)
        assert merge.diff("0").whole.cosine is None


def test_the_command(tmp_path: Path, state: Path) -> None:
    body = machine("diff", "0", "two", "--picture", tmp_path / "out.svg", "--state", state)
    keys = {"a", "b", "a_seq", "b_seq", "whole", "layers", "tensors", "came", "went", "weighed"}
    assert (set(body), body["b_seq"], len(body["came"])) == (keys, 2, 2)
    assert "<svg" in (tmp_path / "out.svg").read_text()
    said = run("diff", "two", "--tensors", "--state", state).stdout
    assert "two (record 2) to HEAD (record 6): difference" in said
    assert "came: 1 model, ft-2\nwent: 1 model, ft-0" in said
    assert said.count("\nmodel.layers.") == 8
    assert "are equal" in run("diff", "HEAD", "--state", state).stdout
    assert machine("show", "two", "--state", state)["seq"] == 2
    assert machine("export", tmp_path / "e", "--at", "two", "--state", state)["directory"]
    for words, told in (
        ("nobody", "no record, no tag"),
        ("99", "no record 99"),
        (str(tmp_path), "no weights at its top"),
    ):
        done = run("diff", words, "--state", state)
        assert (done.returncode in (1, 2), told in done.stderr) == (True, True), done.stderr
    with api.open(state) as merge, pytest.raises(Misconfigured, match="no record 7"):
        merge.diff("7")


def test_a_model_of_another_base_is_refused_in_words(tmp_path: Path, state: Path) -> None:
    shapes = {name: tuple(side + 1 for side in shape) for name, shape in models.SHAPES.items()}
    other = models.base(tmp_path / "other", shapes=shapes)
    with api.open(state) as merge, pytest.raises(Misconfigured, match="no model of this base"):
        merge.diff(str(other))
