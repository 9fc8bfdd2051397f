"""The last word of a round on the models that it left out or let in: what the rule's merge says of a weak one that
serves a task, and of a chosen one that serves none, on real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from continual import api, making
from continual.engine.reading import Reading
from continual.engine.trying import Trials
from continual.executors.contract import silent
from continual.selection.judging import judge
from continual.state.parts import MemberFate
from continual.state.verify import verify
from continual.tensors import Folder, open_model
from tests.helpers import models, quadratic
from tests.helpers.pools import Stopped, bits, fill, loaded, names, opened, rows, table, waits

pytestmark = pytest.mark.slow

FEW = {"held": 0.2}
"""Rows that judge in a trial: so few that a weak model is not sure to help."""


def weak(base: Path, size: float) -> Path:
    """A candidate for the third task, with nearly as much noise as there is good in it."""
    origin, target = (load_file(base.parent / at / "model.safetensors") for at in ("base", "targets/t2"))

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name] + target[name] - origin[name]

    return models.fine_tune(base, base.parent / "pool" / "weak", 7, size=size, change=change)


def world(tmp_path: Path, scale: str, size: float = 0.8) -> tuple[Path, Path]:
    """The base, and a state whose rule sums and is read at this scale, with a pool."""
    base = quadratic.world(tmp_path)
    making.init(base, tmp_path / "state", making.Recipe(rule="task-arithmetic", scale=scale))
    with opened(tmp_path / "state", base, rounds=FEW) as merge:
        fill(merge, quadratic.noise(base, 0), weak(base, size), quadratic.good(base, 0), quadratic.good(base, 1))
    return base, tmp_path / "state"


def losses(merge: api.Merge, at: int) -> list[Tensor]:
    """Of each task the loss of every row at the merge of a record."""
    model = loaded(merge)
    model.put(lambda spec: merge.read(spec.name, at=at), lambda _: 0)
    return [task.task.losses([*task.drive, *task.judge]).detach().double() for task in model.calibration.dealt]


def tidy(merge: api.Merge) -> None:
    """Nothing is left of a trial."""
    there = {entry.name for entry in (merge.state.path / "generations").iterdir()}
    assert there == set(merge.state.generations())
    assert verify(merge.state) == []


def test_a_weak_model_is_kept_where_the_rules_merge_is_better_with_it(tmp_path: Path) -> None:
    """Of two the second is asked of the merge with the first."""
    base, state = world(tmp_path, "0.4", 0.7)
    with opened(state, base, rounds={"held": 0.15}, keep=9) as merge:
        found = rows(merge.round())
        assert names(merge) == ["good0", "weak", "good1"], "those that were chosen first"
        assert waits(merge) == ["noise0"]
        assert found["noise0"].merged is None, "it serves no task, and is not asked again"
        merges = [losses(merge, merge.head - back) for back in (2, 1, 0)]
        for rank, task, name in ((1, 2, "weak"), (2, 1, "good1")):
            row = next(row for row in table(merge) if row.name == name)
            assert (row.fate, row.rank, row.weight, row.judged) == ("chosen", rank, None, 0)
            assert row.z is not None
            assert row.z > -3, "the trial did not find it"
            expected, said = judge(merges[rank - 1], merges[rank], task), row.merged
            assert said is not None
            assert (said.task, said.name, said.rows) == (task, f"tests.helpers.quadratic:make, task {task}", 480)
            assert (said.change, said.error, said.z) == tuple(pytest.approx(figure, rel=1e-3) for figure in expected)
            assert f"kept, since it serves task {task} ({said.name})" in row.message
            assert "on 480 rows changes by -" in row.message
        told = merge.state.ledger.folds()[-1].entry.numbers.relevance
        assert told is not None
        assert (told.z, told.weight, told.merged) == (row.z, None, said)
        tidy(merge)
        assert merge.why("good1").rounds[-1].row == row
    with opened(state, base) as merge:  # as the file has it
        assert next(other for other in table(merge) if other.name == "good1") == row


def test_one_that_is_kept_does_not_expire_however_long_it_waited(tmp_path: Path) -> None:
    base, state = world(tmp_path, "0.4", 0.7)
    with opened(state, base, rounds={"held": 0.15, "age": 1e-6}) as merge:
        fates = {row.name: row.fate for row in merge.round().rows}
        assert names(merge) == ["good0", "weak", "good1"]
        assert fates["noise0"] == "expired"


def test_one_that_the_rules_merge_is_no_better_with_waits_and_hears_why(tmp_path: Path) -> None:
    """The same pool, read so long that any model more is too much."""
    base, state = world(tmp_path, "1.2")
    with opened(state, base, rounds=FEW) as merge:
        row = rows(merge.round())["weak"]
        assert (names(merge), sorted(waits(merge))) == (["good0", "good1"], ["noise0", "weak"])
        assert (row.fate, row.reason, row.judged) == ("deferred", "irrelevant", 1)
        assert row.merged is not None
        assert row.merged.z > 0
        assert "not relevant to the merge as it is (round 1 of 3)" in row.message
        assert "it serves task 2 (" in row.message
        tidy(merge)


def test_who_serves_no_task_is_not_asked(tmp_path: Path) -> None:
    """Another does more for its task: it has no last word, whatever it would do."""
    base, state = world(tmp_path, "0.4")
    with opened(state, base, rounds={**FEW, "patience": 9}) as merge:
        fill(merge, quadratic.good(base, 2))
        found = rows(merge.round())
        assert found["good2"].fate == "folded"
        assert (found["weak"].fate, found["weak"].merged) == ("deferred", None)


def twins(tmp_path: Path) -> tuple[Path, Path]:
    """The base, and a state whose rule sums, with two candidates for the first task: the search takes the second, and
    the first alone and whole does more for the task. With both the merge is a little better."""
    base = quadratic.world(tmp_path)
    making.init(base, tmp_path / "state", making.Recipe(rule="task-arithmetic", scale="0.6"))
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0, "second", seed=1), *(quadratic.good(base, k) for k in range(3)))
    return base, tmp_path / "state"


def test_one_that_was_chosen_and_serves_no_task_is_folded_last_and_stays_where_it_is_missed(tmp_path: Path) -> None:
    base, state = twins(tmp_path)
    with opened(state, base, keep=9) as merge:
        merge.round()
        found = {row.name: row for row in table(merge)}
        assert names(merge) == list(found) == ["good1", "good2", "good0", "second"]
        row = found["second"]
        assert (row.fate, row.rank, row.judged) == ("chosen", 3, 0)
        assert row.weight is not None
        assert row.weight > (found["good1"].weight or 0), "it would be the first"
        assert (found["good0"].weight, found["good1"].merged) == (None, None)
        expected, said = judge(losses(merge, merge.head - 1), losses(merge, merge.head)), row.merged
        assert said is not None
        assert (said.task, said.name, said.rows) == (None, None, 480)
        assert (said.change, said.error, said.z) == tuple(pytest.approx(figure, rel=1e-3) for figure in expected)
        assert row.message.startswith(f"second: weight {row.weight:.4g}; it serves no task, and with it folded too")
        told = merge.state.ledger.folds()[-1].entry.numbers.relevance
        assert told is not None
        assert told.merged == said
        tidy(merge)


def test_one_that_was_chosen_waits_where_the_rules_merge_does_not_miss_it(tmp_path: Path) -> None:
    """The same pool, where more is asked of those that stay: the search finds that of all, and the merge not of it."""
    base, state = twins(tmp_path)
    with opened(state, base, rounds={"patience": 2, "stays": 2.5}) as merge:
        row = rows(merge.round())["second"]
        assert (names(merge), waits(merge)) == (["good1", "good2", "good0"], ["second"])
        assert (row.fate, row.reason, row.judged, row.rank) == ("deferred", "irrelevant", 1, None)
        assert row.weight is not None, "the search let it in"
        assert row.merged is not None
        assert -2.5 < row.merged.z < 0
        assert row.message.startswith("second: not relevant to the merge as it is (round 1 of 2): it serves no task")
        tidy(merge)
    with opened(state, base) as merge:  # as the file has it
        assert next(other for other in table(merge) if other.name == "second") == row


def test_a_kill_in_the_middle_leaves_nothing_and_the_choice_is_the_same(tmp_path: Path) -> None:
    base, state = world(tmp_path, "0.4")
    begun: list[str] = []

    def stop(step: str) -> None:
        begun.append(step)
        if begun.count("begin") == 3:  # on trial the two that were chosen, then the weak one
            raise Stopped

    shutil.copytree(state, tmp_path / "whole")
    with opened(state, base, rounds=FEW, on_step=stop) as merge, pytest.raises(Stopped):
        merge.round()
    with opened(state, base, rounds=FEW) as merge:
        assert merge.state.ledger.open_round is not None
        assert names(merge) == []
        tidy(merge)
        merge.round()
        killed = names(merge), bits(merge), [(row.name, row.fate, row.merged) for row in table(merge)]
        assert killed[0] == ["good0", "good1", "weak"]
    with opened(tmp_path / "whole", base, rounds=FEW) as merge:
        merge.round()
        assert killed == (names(merge), bits(merge), [(row.name, row.fate, row.merged) for row in table(merge)])


def test_one_that_a_gate_would_refuse_has_no_last_word(tmp_path: Path) -> None:
    """A twin of a model that is in the merge by then, under another name."""
    base, state = world(tmp_path, "0.4")
    with opened(state, base, select="none") as merge:
        twin = tmp_path / "twin"
        twin.mkdir()
        for file in (base.parent / "pool" / "weak").iterdir():
            (twin / file.name).write_bytes(file.read_bytes())
        assert merge.fold(twin).fate == "folded"
    with opened(state, base, rounds=FEW) as merge:
        found: dict[str, MemberFate] = rows(merge.round())
        assert found["weak"].merged is None
        tidy(merge)


@pytest.mark.parametrize("width", [None, 64])
def test_a_fold_on_trial_reads_as_the_fold_in_earnest(tmp_path: Path, width: int | None) -> None:
    base = quadratic.world(tmp_path)
    paths = [quadratic.lora(base, k, f"good{k}", seed=k) for k in range(3)]
    making.init(base, tmp_path / "state", making.Recipe(rule="iso-c", width=width))
    with opened(tmp_path / "state", base, select="none", workers=1, keep=9) as merge:
        assert merge.fold(paths[0]).fate == "folded"
        tried = []
        with Trials(merge.engine, silent) as trials:
            on = merge.engine
            for path in paths[1:]:
                with open_model(Folder(path)) as model:
                    further = trials.fold(on, model)
                assert further is not None
                tried.append(read(merge.reading_of(further.state), merge))
                if on is not merge.engine:
                    trials.drop(on)
                on = further
            assert merge.head == 1, "no record says it"
        tidy(merge)
        for path, expected in zip(paths[1:], tried, strict=True):
            assert merge.fold(path).fate == "folded"
            for name, value in read(merge.reading(), merge).items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def read(reading: Reading, merge: api.Merge) -> dict[str, Tensor]:
    reading.settle(merge.executor, silent)
    return {spec.name: reading.vector(spec) for spec in merge.state.format.tensors if spec.kind != "carried"}
