"""Tuning the scale of a state of adapters: the candidates are whole models, so it takes the weights of the base; what
is tried and chosen is what a state of whole tensors tries and chooses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.tuning import Command, Tuning
from tests.helpers import adapters, models, packing

NORM = """
import sys
from pathlib import Path
import numpy
from safetensors.numpy import load_file
base, model = (load_file(Path(at) / "model.safetensors") for at in sys.argv[1:])
print(sum(float(numpy.linalg.norm(model[name] - base[name])) for name in base))
"""


def folded(state: Path, base: Path, tuned: list[Path], name: str, width: int | None) -> Path:
    making.init(base, state, making.Recipe(rule=name, width=width))
    with api.Merge(Settings(state=state, max_base_ratio=100.0), write=True) as merge:
        for model in tuned:
            assert merge.fold(model).fate == "folded"
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["task-arithmetic", "iso-c", "ties"])
def test_it_tries_what_a_state_of_whole_tensors_tries(tmp_path: Path, name: str) -> None:
    base = models.base(tmp_path / "base")
    tuned = [adapters.lora(tmp_path / f"lora-{i}", base, i) for i in range(2)]
    (tmp_path / "norm.py").write_text(NORM)
    command = Command((sys.executable, str(tmp_path / "norm.py"), str(base), "{model}"))
    found = []
    for width in (16, None):
        state = folded(tmp_path / f"state-{width}", base, tuned, name, width)
        with api.Merge(Settings(state=state), write=True) as merge:
            found.append(merge.tune(command, Tuning(candidates=3)))
    blocks, dense = found
    assert [trial.scale for trial in blocks.entry.trials] == [trial.scale for trial in dense.entry.trials]
    expected = [pytest.approx(trial.score, rel=1e-4) for trial in dense.entry.trials]
    assert [trial.score for trial in blocks.entry.trials] == expected


def test_over_a_quantised_base_it_takes_the_original(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    tuned = [adapters.lora(tmp_path / f"lora-{i}", base, i) for i in range(2)]
    packed = packing.packed(base, tmp_path / "packed", "awq")
    state = folded(tmp_path / "state", packed, tuned, "mean", 16)
    command = Command(("test", "-f", "{model}/model.safetensors"))
    with api.Merge(Settings(state=state), write=True) as merge, pytest.raises(Misconfigured, match="is quantised"):
        merge.tune(command)
    with api.Merge(Settings(state=state, base=base), write=True) as merge:
        with pytest.raises(Misconfigured, match="printed nothing"):  # it was there
            merge.tune(command)
        assert merge.head == 2
