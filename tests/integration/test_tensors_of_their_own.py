"""A rule that has to know all of a tensor before it folds any of it: a large one goes through it in runs all the same,
after passes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual import api, making
from continual.config import Settings
from continual.engine import passes
from continual.rules import ties
from tests.helpers import models


@pytest.mark.parametrize("density", [0.2, 0.001, 0.9])
def test_a_large_tensor_is_trimmed_by_itself_in_runs(
    memory: Path, monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    """The state is the same, bit for bit, after folds and after one was taken out."""
    base = models.base(memory / "base", shapes={"a.weight": (70, 90), "b.weight": (64, 30), "c": (9000,)})
    tuned = [models.fine_tune(base, memory / f"tuned-{n}", n) for n in range(3)]

    def folded(state: Path, large: int) -> dict[str, list[bytes]]:
        recipe = making.Recipe(rule="ties", options={"trim": "tensor", "density": density})
        making.init(base, state, recipe)
        monkeypatch.setattr(passes, "LARGE", large)
        with api.Merge(Settings(state=state, keep=9), write=True) as merge:
            assert [merge.fold(model).fate for model in tuned] == ["folded"] * 3
            merge.unfold(merge.look_unfold("tuned-1"))
            names = [spec.name for spec in merge.state.format.tensors]
            slots = (ties.PLUS, ties.MINUS, ties.COUNT_PLUS, ties.COUNT_MINUS)
            return {name: [merge.state.read(name, slot).tobytes() for slot in slots] for name in names}

    expected = folded(memory / "whole", 1 << 22)
    with monkeypatch.context() as no_whole:
        no_whole.setattr("continual.rules.trimming.own_threshold", None)
        assert folded(memory / "runs", 1000) == expected
