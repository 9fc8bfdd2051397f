"""What the record of a fold says of how a task vector lies to the merge before it, under several
rules."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from continual.state.parts import MetNumbers
from continual.tensors.vectors.meeting import meeting_of
from tests.helpers import adapters
from tests.integration.test_doubts import NAMES, base, opened, tuned

__all__ = ["base"]


@pytest.mark.parametrize("rule", ["task-arithmetic", "iso-c", "tsv-m", "opcm", "ties"])
def test_the_numbers_are_those_of_the_tensors(tmp_path: Path, base: Path, rule: str) -> None:
    zero = load_file(base / "model.safetensors")
    taus = []
    with opened(tmp_path / "state", base, rule, gates={"norms": {"act": "off"}}) as merge:
        for seed in range(3):
            path = tuned(base, seed)
            taus.append({n: (t - zero[n]).numpy() for n, t in load_file(path / "model.safetensors").items()})
            assert merge.fold(path).fate == "folded"
        met = [fold.entry.numbers.met for fold in merge.state.ledger.folds()]
        assert met[0] is None, "there was no merge"
        if rule == "task-arithmetic":
            merge.state.rollback(1)
            lora = adapters.lora(tmp_path / "lora", base, 5, modules=("up_proj",))
            assert merge.fold(lora).fate == "folded"
            by_lora = merge.state.ledger.folds()[-1].entry.numbers.met
            assert by_lora is not None
            assert (len(by_lora.cosines), by_lora.sampled) == (2, None)
    last = met[2]
    assert isinstance(last, MetNumbers)
    if rule == "ties":
        assert (len(last.cosines), last.overlap) == (2, None)
        return
    expected = []
    for name in NAMES:
        one, merged = taus[2][name], taus[0][name] + taus[1][name]
        if rule != "opcm":
            cosine = np.vdot(one, merged) / math.sqrt(np.vdot(one, one) * np.vdot(merged, merged))
            assert last.cosines[NAMES.index(name)] == pytest.approx(cosine, abs=2e-3)
        expected.append(meeting_of(one, merged))
    assert last.sampled == (0, 1)
    if rule == "opcm":
        assert last.removed is not None
        assert all(0.0 < each < 0.2 for each in last.removed), last.removed
        return
    assert last.overlap == pytest.approx([each.overlap for each in expected], abs=0.02)
    assert last.conflict == pytest.approx([each.conflict for each in expected], abs=0.02)


@pytest.mark.parametrize(
    ("settings", "fate"), [({}, "folded"), ({"act": "refuse"}, "refused"), ({"act": "off"}, "folded")]
)
def test_one_that_points_against_the_merge_is_warned_of(
    tmp_path: Path, base: Path, settings: dict[str, object], fate: str
) -> None:
    gates = {"interference": settings, "copies": {"act": "off"}, "norms": {"act": "off"}}
    with opened(tmp_path / "state", base, "tsv-m", gates=gates) as merge:
        for seed in range(2):
            merge.fold(tuned(base, seed))
        outcome = merge.fold(tuned(base, 1, -0.5, "against"))
        assert outcome.fate == fate, outcome.message
        if fate == "refused":
            assert outcome.reason == "interference"
        else:
            warned = merge.state.ledger.folds()[-1].entry.numbers.warned
            assert warned == ("" if settings else "interference")
