"""An export makes each tensor once, in pieces where it can, and the same bytes whichever way it goes."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.engine import reading, spool
from continual.errors import Halt
from continual.publish import exported_weights
from continual.records import TensorSpec
from continual.state import generation
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
        there = self.spool is not None and self.spool.get(spec.name, spec.shape) is not None
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


def test_an_export_spools_the_matrices_whose_length_it_has_to_find_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spooled: list[dict[str, int]] = []
    asked: list[int] = []

    class Seen(spool.Spool):
        def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
            spooled.append(dict(sizes))
            super().__init__(directory, sizes)

    def roomy(_directory: Path, nbytes: int) -> bool:
        asked.append(nbytes)
        return True

    monkeypatch.setattr(spool, "Spool", Seen)
    monkeypatch.setattr(reading, "roomy", roomy)
    with folded(tmp_path, "iso-c") as merge:
        matrices = {spec.name: spec.numel for spec in merge.state.format.tensors if spec.kind == "matrix"}
        exported(merge, tmp_path / "first")
        assert spooled == [matrices]
        assert asked == [4 * sum(matrices.values()) + merge.base.checkpoint.nbytes]
        exported(merge, tmp_path / "second")  # how long they are is known
        merge.state.rollback(0)
        assert exported(merge, tmp_path / "nothing") == (tmp_path / "base/model.safetensors").read_bytes()
    assert len(spooled) == 1


def test_lengths_that_an_earlier_version_did_not_keep_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folded(tmp_path, "iso-c") as merge:
        first = exported(merge, tmp_path / "first")
    monkeypatch.setattr(generation.Generation, "square", lambda *_: None)
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        assert exported(merge, tmp_path / "second") == first


def test_what_the_disk_does_not_take_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with folded(tmp_path, "iso-c") as merge:
        first = exported(merge, tmp_path / "first")
    monkeypatch.setattr(spool.Spool, "put", full)
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        assert exported(merge, tmp_path / "second") == first


def test_a_spool_gives_back_what_it_was_given(tmp_path: Path) -> None:
    values = {"a": torch.tensor(3.0), "b": torch.randn(5, 7), "c": torch.empty(0, 3), "d": torch.randn(4, 6).mT}
    kept = spool.Spool(tmp_path, {name: value.numel() for name, value in values.items()} | {"e": 2})
    assert list(tmp_path.iterdir()) == []
    for name, value in reversed(values.items()):
        kept.put(name, value)
    for name, value in values.items():
        found = kept.get(name, tuple(value.shape))
        assert found is not None
        assert torch.equal(found, value)
    assert kept.get("e", (2,)) is None
    kept._there.add("e")  # what was cut off behind its back
    with pytest.raises(OSError, match=f"in {tmp_path} ends early"):
        kept.get("e", (2,))
    kept.close()
    assert kept.get("b", (5, 7)) is None
    with pytest.raises(ValueError, match="closed file"):
        kept.put("b", values["b"])


def test_what_is_written_and_read_a_few_bytes_at_a_time_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read(fd, [into[0][:5]], at))
    value = torch.randn(6)
    with closing(spool.Spool(tmp_path, {"a": 6})) as kept:
        kept.put("a", value)
        found = kept.get("a", (6,))
    assert found is not None
    assert torch.equal(found, value)


def test_a_tenth_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=1000, free=110))
    assert spool.roomy(tmp_path, 10)
    assert not spool.roomy(tmp_path, 11)


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


def test_a_value_that_the_dtype_cannot_hold_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("w", (4,), "F32", "plain")
    assert exported_weights.added(torch.ones(4), torch.ones(4), spec, "F16").tolist() == [2.0] * 4
    large = torch.tensor([3e38, 3e38, 3e38, 0.0])
    assert exported_weights.added(large.clone(), torch.zeros(4), spec, "F32").tolist() == large.tolist()
    for values in ([1.0, 7e4, -7e4, 0.0], [1.0, 0.0, 0.0, float("nan")], [0.0, 0.0, 0.0, -7e4]):
        with pytest.raises(Halt, match="tensor w has values that F16 cannot hold"):
            exported_weights.added(torch.tensor(values), torch.zeros(4), spec, "F16")
    monkeypatch.delattr(torch, "isfinite")  # which is not asked: the sum is above all of F16, and it is a float32
    assert exported_weights.added(torch.full((4,), 6e4), torch.zeros(4), spec, "F16").tolist() == [6e4] * 4


def test_memory_that_is_reserved_for_a_tensor_is_what_making_it_takes(tmp_path: Path) -> None:
    with folded(tmp_path, "iso-c") as merge:
        found = merge.reading()
        matrix, plain = (next(s for s in merge.base.specs if s.kind == kind) for kind in ("matrix", "plain"))
        assert exported_weights.need(matrix, found) == matrix.nbytes + found.need(matrix)
        assert exported_weights.need(plain, found) == plain.nbytes + found.need(plain)
        long = replace(plain, shape=(8 * exported_weights.RUN,))
        assert exported_weights.need(long, found) == (long.nbytes + found.need(long)) // 4
        carried = replace(plain, kind="carried")
        assert exported_weights.need(carried, found) == carried.nbytes
