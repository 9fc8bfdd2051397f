"""The objective that ops/docs/selection.md shows how to write is one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from continual.objectives.calibration import load
from tests.helpers.pools import wanted

PAGE = Path(__file__).parents[3] / "ops" / "docs" / "selection.md"


def test_the_function_on_the_page_can_be_calibrated_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def make(" in block
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_kept.py").write_text(code)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    for file in ("upright.safetensors", "turned.safetensors"):
        save_file({"images": torch.randn(12, 8, 8), "labels": torch.arange(12) % 10}, tmp_path / file)
    try:
        found = load(wanted("digits_kept:make", batch=5), tmp_path, torch.device("cpu"))
        assert found.backward() == pytest.approx(found.loss(), rel=1e-5)
        assert [len(losses) for losses in found.held()] == [6, 6]
    finally:
        sys.modules.pop("digits_kept", None)
