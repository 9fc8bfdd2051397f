"""Matrices that are made to know how long a merge is, and kept for whoever writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from continual.engine import reading
from continual.executors.contract import Task
from continual.publish.lora import LoraTarget
from continual.records import TensorSpec
from tests.helpers import models
from tests.helpers.posted import Posted
from tests.integration.test_export_orders import SHAPES, Between, both, made_of, opener


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base", shapes=SHAPES)


class Fresh:
    """Where matrices are made: how often, of each tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: Counter[str] = Counter()
        unit = reading._unit

        def counted(self_: reading.Reading, spec: TensorSpec, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
            self.made[spec.name] += 1
            return unit(self_, spec, kept)

        monkeypatch.setattr(reading, "_unit", counted)


@pytest.mark.parametrize("harm", ["none", "altered", "gone", "short"])
def test_a_matrix_is_made_once_by_whoever_measures_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """And again where it is not what was kept."""
    state, fresh = made_of(tmp_path, "tsv-m", base), Fresh(monkeypatch)
    name = "model.layers.1.mlp.down_proj.weight"
    passes = []

    def between(tasks: Sequence[Task[Any]]) -> Sequence[Task[Any]]:
        passes.append(len(tasks))
        spooled = list(tmp_path.glob(".export*.tmp/.spool/*"))
        if harm != "none" and len(passes) == 2:
            file = next(path for path in spooled if path.name == blake3(name.encode()).hexdigest(16))
            data = file.read_bytes()
            file.unlink()
            if harm != "gone":
                file.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if harm == "altered" else b""))
        return tasks

    both(tmp_path, state, opener(Between(between)), lambda merge, at: merge.export(at))
    assert len(passes) == 2, "measured, and written"
    assert fresh.made[name] == (2 if harm == "none" else 3), "alone, and by orders"
    assert {path.name for path in (tmp_path / "export-1").iterdir()} == {
        path.name for path in (tmp_path / "export-0").iterdir()
    }
    fresh.made.clear()
    both(tmp_path / "lora", state, opener(Posted(1 << 12)), lambda merge, at: merge.export_lora(LoraTarget(at, 2)))
    assert fresh.made[name] == 2
