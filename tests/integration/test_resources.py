"""What a fold takes of the machine: the bits do not depend on the threads, and a plan says how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.engine import planning
from continual.engine.engine import Engine
from continual.engine.resources import Resources
from continual.executors.contract import Task
from continual.executors.local import Local
from tests.helpers import models
from tests.helpers.streams import FOLDING

pytestmark = pytest.mark.slow

T = TypeVar("T")
SIDE = 1400
FOLD = """
import hashlib, json, sys
from pathlib import Path
import torch
from continual import api, making

place, state, rule, workers = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def memory(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))

making.init(place / "base", state, making.Recipe(rule=rule))
with api.open(state, write=True, workers=workers) as merge:
    assert merge.fold(place / "ft-0").fate == "folded"
    planned = merge.plan(place / "ft-1").memory_bytes
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what is there now
    before = memory("VmRSS")
    outcome = merge.fold(place / "ft-1")
    assert outcome.fate == "folded"
    grown = memory("VmHWM") - before
    bits = hashlib.sha256(json.dumps(sorted(outcome.report.totals.body().items())).encode())
    for name, slots in sorted(merge.state.format.slots.items()):
        for slot in slots:
            bits.update(merge.state.read(name, slot).tobytes())
print(json.dumps({"bits": bits.hexdigest(), "threads": torch.get_num_threads(), "planned": planned, "grown": grown}))
"""


def folded(place: Path, state: str, rule: str, *, workers: int, threads: int) -> dict[str, Any]:
    """Two fine-tunes folded in a process whose torch takes so many threads."""
    environ = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    arguments = [str(place), str(place / state), rule, str(workers)]
    run = subprocess.run(
        [sys.executable, "-c", FOLD, *arguments], env=environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    assert found["threads"] == threads
    return found


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="torch takes one thread on one core")
def test_bits_depend_neither_on_the_workers_nor_on_the_threads_that_torch_would_take(tmp_path: Path) -> None:
    """The decompositions of tsv-m round otherwise on two threads than on one, on matrices of this size."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (400, 300), "model.layers.1.mlp.up_proj.weight": (300, 400)}
    base = models.base(tmp_path / "base", shapes=shapes)
    for number in range(2):
        models.fine_tune(base, tmp_path / f"ft-{number}", number)
    with_one = folded(tmp_path, "one", "tsv-m", workers=1, threads=1)["bits"]
    assert folded(tmp_path, "two", "tsv-m", workers=2, threads=2)["bits"] == with_one


@pytest.mark.slow
def test_a_fold_takes_about_as_much_memory_as_its_plan_says(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (SIDE, SIDE) for i in range(4)}
    base = models.base(tmp_path / "base", shapes=shapes)
    for number in range(2):
        models.fine_tune(base, tmp_path / f"ft-{number}", number)
    found = folded(tmp_path, "state", "iso-c", workers=2, threads=1)
    assert found["planned"] >= 2 * 2 * 4 * SIDE * SIDE, "two tensors at a time, each with its accumulator"
    assert 0.4 * found["planned"] < found["grown"] < 1.3 * found["planned"]


class Noting(Local):
    """A local executor that keeps the needs of all tasks it was given."""

    def __init__(self, workers: int, budget: int) -> None:
        super().__init__(workers, budget)
        self.needs: list[list[int]] = []

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        self.needs.append([task.need for task in tasks])
        return super().map(tasks)


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize(("workers", "budget"), [(1, 1 << 40), (3, 1 << 40), (3, 30_000_000), (3, 1)])
def test_a_plan_counts_the_tasks_that_can_run_at_a_time(tmp_path: Path, name: str, workers: int, budget: int) -> None:
    base = models.base(tmp_path / "base")
    model = models.ship(models.fine_tune(base, tmp_path / "alice", 1), 1)
    making.init(base, tmp_path / "state", making.Recipe(rule=name))
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        executor = Noting(workers, budget)
        resources = Resources(executor, torch.device("cpu"))
        engine = Engine(merge.state, merge.base, merge.rule, merge.engine.gates, resources)
        place = merge.places.named(model)
        planned = planning.plan(engine, place).memory_bytes
        assert executor.needs == [], "a plan runs nothing"
        assert engine.fold(place).fate == "folded"
    largest = sorted(executor.needs[-1])[-workers:]
    assert planned == max(min(sum(largest), budget), largest[-1])
