"""The gate that evaluates asks calibration rows, with no command, and asks more of them where they do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import continual
from continual import api
from continual.config import Settings
from continual.errors import Misconfigured
from continual.service import publishing
from continual.service.canary import measuring, stages
from continual.service.outgoing import outgoing
from continual.state.canaries import CanaryRecord, Measurement
from continual.state.entries import FoldEntry
from continual.state.parts import Evaluated
from tests.helpers import adapters, calibrated, models
from tests.helpers.calibrated import made
from tests.helpers.tiny import loaded

pytestmark = pytest.mark.slow
NO_GATES = {name: {"act": "off"} for name in ("norms", "noise", "copies")}


def tuned(base: Path, name: str, by: float) -> Path:
    """A fine-tune that moves every matrix at random, by so much of its length."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        draw = torch.Generator().manual_seed(len(name))
        for key, value in load_file(base / "model.safetensors").items():
            noise = torch.randn(value.shape, generator=draw)
            tensors[key] = (value.float() + by * noise * value.float().std()).to(value.dtype)

    return models.fine_tune(base, base.parent / name, 1, change=change)


def opened(place: Path, given: calibrated.Calibrated, **evaluation: Any) -> continual.Merge:
    wanted = given.wanted
    if not (place / "state").exists():
        continual.init(given.base, place / "state", continual.Recipe(rule="task-arithmetic", scale="1"))
    asked = {"objective": wanted.objective, "rows": wanted.rows, "heads": wanted.heads} | evaluation
    return continual.open(place / "state", write=True, device="cpu", gates=NO_GATES, evaluation=asked)


def evaluated(merge: continual.Merge, model: Path) -> Evaluated:
    outcome = merge.fold(model)
    assert outcome.fate == "folded", outcome.message
    found = outcome.commit.of_kind(FoldEntry).numbers.evaluated
    assert found is not None
    return found


@pytest.mark.parametrize("objective", ["causal-lm", "classification", "heads"])
def test_rows_say_what_a_plain_loop_says(tmp_path: Path, objective: str) -> None:
    given = made(objective, tmp_path)
    with opened(tmp_path, given, max_drop=1e3) as merge:
        found = evaluated(merge, tuned(given.base, "one", 0.3))
        merge.export(tmp_path / "merged")
    assert (found.verdict, found.rows) == ("pass", calibrated.ROWS)
    for file in given.wanted.rows:
        for metrics, model in ((found.before, given.base), (found.after, tmp_path / "merged")):
            with torch.no_grad():
                losses = calibrated.plain_losses(objective, loaded(objective, model), given.base, calibrated.read(file))
            wanted = losses if objective == "causal-lm" else (-losses).exp()
            assert (metrics or {})[file.stem] == pytest.approx(float(wanted.mean()), rel=2e-3)
    assert (found.errors or {})["task-0"] > 0


def test_rows_that_are_edited_while_it_runs_are_read_again(tmp_path: Path) -> None:
    given = made("causal-lm", tmp_path)
    with opened(tmp_path, given, max_drop=1e3) as merge:
        assert evaluated(merge, tuned(given.base, "one", 0.3)).rows == calibrated.ROWS
        for file in given.wanted.rows:
            file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
        assert evaluated(merge, tuned(given.base, "another", 0.3)).rows == calibrated.ROWS - 1


def test_a_merge_that_answers_worse_is_refused_and_one_as_good_is_not(tmp_path: Path) -> None:
    given = made("causal-lm", tmp_path)
    with opened(tmp_path, given) as merge:
        assert merge.fold(tuned(given.base, "hardly", 1e-4)).fate == "folded"
        outcome = merge.fold(tuned(given.base, "spoilt", 30.0))
        assert (outcome.fate, outcome.reason) == ("refused", "evaluation"), outcome.message
        assert "task-0 is worse by" in outcome.message
        assert "over 24 rows than the merge in force" in outcome.message
    assert continual.verify(tmp_path / "state").findings == ()


@pytest.mark.parametrize("objective", ["causal-lm", "heads"])
def test_a_merge_that_says_nothing_finite_is_refused(tmp_path: Path, objective: str) -> None:
    """Its weights are finite, and what they make of rows is not."""
    given = made(objective, tmp_path)
    huge = tuned(given.base, "huge", 1e37)
    with opened(tmp_path, given, max_drop=1e6) as merge:
        outcome = merge.fold(huge)
        assert (outcome.fate, outcome.reason) == ("refused", "evaluation"), outcome.message
        assert "is nan" in outcome.message, outcome.message
        assert merge.fold(huge).fate == "known"


def test_more_rows_are_asked_until_they_tell(tmp_path: Path) -> None:
    """Of the first eight rows nothing is known for certain; all of them tell, or are held."""
    given = made("causal-lm", tmp_path)
    model = tuned(given.base, "spoilt", 30.0)
    few = {"first_rows": 4, "max_rows": 4, "chance": 1e-6}
    with opened(tmp_path, given, **few) as merge:
        outcome = merge.fold(model)
        assert (outcome.reason, "over 4 rows" in outcome.message) == ("unclear", True), outcome.message
        assert merge.fold(model).fate == "known", "it stands while the rows are the same"
    with opened(tmp_path, given, first_rows=4, max_rows=100, chance=1e-4) as merge:
        outcome = merge.fold(model)
        assert (outcome.reason, "over 24 rows" in outcome.message) == ("evaluation", True), outcome.message
    with opened(tmp_path, given, **few, inconclusive="refuse") as merge:
        assert merge.fold(model).reason == "evaluation"
    with opened(tmp_path, given, **few, inconclusive="fold") as merge:
        outcome = merge.fold(model)
        assert (outcome.fate, "warning (evaluation)" in outcome.line()) == ("folded", True)
        assert outcome.commit.of_kind(FoldEntry).numbers.warned == "unclear"


def test_the_base_can_be_what_it_is_compared_with(tmp_path: Path) -> None:
    given = made("causal-lm", tmp_path)
    with opened(tmp_path, given, max_drop=50.0, max_drop_base=0.02) as merge:
        found = evaluated(merge, tuned(given.base, "hardly", 1e-4))
        assert found.base == found.before
        outcome = merge.fold(tuned(given.base, "a little", 30.0))
        assert "than the base (evaluation.max_drop_base = 0.02)" in outcome.message


def test_a_state_of_adapters_is_asked_by_rows(tmp_path: Path) -> None:
    given = made("heads", tmp_path)
    continual.init(given.base, tmp_path / "state", continual.Recipe(rule="tsv-m", width=8))
    with opened(tmp_path, given) as merge:
        lora = adapters.lora(tmp_path / "lora", given.base, 1, modules=("query",))
        for file in lora.glob("*.safetensors"):
            save_file({k: v * 1e-3 for k, v in load_file(file).items()}, file)
        assert evaluated(merge, lora).verdict == "pass"


@pytest.mark.parametrize("form", ["whole", "a view of adapters"])
def test_rows_watch_a_canary(tmp_path: Path, form: str) -> None:
    """Beside the base first, and then beside what was promoted."""
    view = None if form == "whole" else "short"
    given = made("causal-lm" if view is None else "heads", tmp_path)
    recipe = continual.Recipe(rule="task-arithmetic", scale="1", width=None if view is None else 8)
    continual.init(given.base, tmp_path / "state", recipe)

    def settings(**evaluation: Any) -> Settings:
        wanted = given.wanted
        asked = {"objective": wanted.objective, "rows": wanted.rows, "heads": wanted.heads} | evaluation
        canary = {"canary": {"evaluate": True}}
        out = {"current": tmp_path / "current"}
        out |= {"release": canary} if view is None else {"views": {view: out | canary | {"scale": "0.5"}}}
        return Settings.model_validate(
            out | {"state": tmp_path / "state", "device": "cpu", "gates": NO_GATES, "evaluation": asked}
        )

    def model(name: str, by: float) -> Path:
        if view is None:
            return tuned(given.base, name, by)
        lora = adapters.lora(tmp_path / name, given.base, len(name), modules=("query", "value", "dense"))
        for file in lora.glob("*.safetensors"):
            save_file({k: v * by for k, v in load_file(file).items()}, file)
        return lora

    loose = settings(max_drop=1e6)
    with api.Merge(loose, write=True) as merge:

        def put_out(name: str, by: float) -> CanaryRecord:
            merge.settings = loose
            outcome = merge.fold(model(name, by))
            assert outcome.fate == "folded", outcome.message
            found = stages.step(merge, view, merge.head)
            assert found is not None
            publishing.put(merge, found.out, found.seq)
            stages.done(merge, view, "publish", found.seq, "goes out")
            merge.settings = settings(chance=0.4)  # of 24 rows little is known
            record = merge.state.canaries.get(view)
            assert record is not None
            return record

        def looked(record: CanaryRecord) -> Measurement:
            return measuring.measure(merge, outgoing(merge.settings, view), record)

        found = looked(put_out("hardly", 1e-4))
        assert (found.verdict, found.said.startswith("evaluation: task-0 ")) == ("passed", True), found
        stages.finish(merge, stages.promote(merge, view, None, "command", ""))
        record = put_out("spoilt", 30.0)
        found = looked(record)
        assert (found.verdict, "is worse by" in found.said) == ("failed", True), found
        given.wanted.rows[0].unlink()
        found = looked(record)
        assert (found.verdict, given.wanted.rows[0].name in found.said) == ("inconclusive", True), found


def test_what_rows_lack_is_said_before_anything_is_folded(tmp_path: Path) -> None:
    given = made("causal-lm", tmp_path)
    with opened(tmp_path, given, rows=[tmp_path / "none.jsonl"]) as merge, pytest.raises(Misconfigured, match="none"):
        _ = merge.engine
