"""An export makes each tensor once, in pieces where it can, and the same bytes whichever way it goes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.engine import reading
from continual.errors import Halt
from continual.publish import exported_weights
from continual.records import TensorSpec
from tests.helpers import models


def folded(place: Path, rule: str) -> api.Merge:
    base = models.base(place / "base", dtype=torch.bfloat16)
    making.init(base, place / "state", making.Recipe(rule=rule))
    merge = api.Merge(Settings(state=place / "state"), write=True)
    for number in range(3):
        assert merge.fold(models.fine_tune(base, place / f"model-{number}", number)).fate == "folded"
    return merge


def exported(merge: api.Merge, target: Path) -> bytes:
    return (merge.export(target) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rule", ["iso-c", "tsv-m"])
def test_a_matrix_is_made_once_where_the_disk_has_room(
    tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()
    unit = reading.Reading.unit

    def counted(self: reading.Reading, spec: TensorSpec) -> torch.Tensor:
        there = self._spool is not None and self._spool.get(spec.name, spec.shape) is not None
        made[spec.name] += not there
        return unit(self, spec)

    monkeypatch.setattr(reading.Reading, "unit", counted)
    with folded(tmp_path, rule) as merge:
        matrices = [spec.name for spec in merge.state.format.tensors if spec.kind == "matrix"]
        first = exported(merge, tmp_path / "first")
        assert {made[name] for name in matrices} == {1}
        assert exported(merge, tmp_path / "second") == first  # how long they are is known: none is spooled
        assert {made[name] for name in matrices} == {2}
    made.clear()
    monkeypatch.setattr(reading, "roomy", lambda *_: False)
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        assert exported(merge, tmp_path / "third") == first
    assert {made[name] for name in matrices} == {2}


@pytest.mark.parametrize("rule", ["iso-c", "opcm", "ties", "task-arithmetic", "magmax"])
def test_pieces_of_any_length_give_the_same_bytes(tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with folded(tmp_path, rule) as merge:
        monkeypatch.setattr(reading.Reading, "kept_by_elements", False)
        whole = exported(merge, tmp_path / "whole")
        monkeypatch.setattr(reading.Reading, "kept_by_elements", True)
        assert exported(merge, tmp_path / "runs") == whole
        monkeypatch.setattr(exported_weights, "RUN", 37)
        assert exported(merge, tmp_path / "short") == whole


def test_what_the_state_knows_of_lengths_is_not_measured(tmp_path: Path) -> None:
    passes: list[int] = []
    with folded(tmp_path, "opcm") as merge:
        found = merge.reading()
        found.settle(merge.executor, lambda _, __, total: passes.append(total))
        squares = [0.0, 0.0]
        for spec in merge.state.format.tensors:
            squares[spec.kind != "matrix"] += float(found.unit(spec).double().square().sum())
    assert passes == [0]
    parts = found.size().parts
    assert parts is not None
    assert [part**2 for part in parts] == pytest.approx(squares, rel=1e-6)


def test_a_value_that_the_dtype_cannot_hold_names_the_tensor() -> None:
    spec = TensorSpec("w", (4,), "F32", "plain")
    assert exported_weights.added(torch.ones(4), torch.ones(4), spec, "F16").tolist() == [2.0] * 4
    large = torch.tensor([3e38, 3e38, 3e38, 0.0])
    assert exported_weights.added(large.clone(), torch.zeros(4), spec, "F32").tolist() == large.tolist()
    with pytest.raises(Halt, match="tensor w has values that F16 cannot hold"):
        exported_weights.added(torch.tensor([1.0, 7e4, -7e4, 0.0]), torch.zeros(4), spec, "F16")
