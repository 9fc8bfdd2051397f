"""Many machines against one: folds and exports on a Ray cluster beside those in this process, in one run.

    python -m tests.campaigns.bench.many_machines --gigabytes 1 --repeats 3 [--work fold export]

The same fine-tune is folded in turns by one thread and by two of this process, and by one worker and by two on a
cluster of two nodes on loopback, that has folded once before: what a cluster costs beyond its start. Then the merge is
exported in turns, each time as by who does not know how long it is. The bits have to be the same. Said are wall
seconds, and of the cluster also how long orders took on its workers, so that what waits and what is sent shows.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from continual import api, making
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.executors.contract import Executor
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from tests.campaigns.faults.ray_exports import weights
from tests.campaigns.faults.ray_kills import contents
from tests.helpers import models
from tests.helpers.clusters import cluster


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"{os.cpu_count()} cores, {name}, {platform.system()}, load {os.getloadavg()[0]:.0f} at the beginning"


class Turn(NamedTuple):
    """One fold or export: wall seconds, what came of it by hashes, seconds of orders on workers, orders."""

    seconds: float
    found: dict[str, str]
    spent: float
    orders: int


def turn(state: Path, executor: Executor, work: Callable[[api.Merge], dict[str, str]]) -> Turn:
    """Does `work` with a merge whose work `executor` does."""

    class By(api.Merge):
        @property
        def executor(self) -> Executor:
            return executor

    before = FIGURES.seen().all
    with By(Settings(state=state), write=True) as merge:
        assert merge.engine.executor is executor
        began = time.perf_counter()
        found = work(merge)
        seconds = time.perf_counter() - began
    after = FIGURES.seen().all
    return Turn(seconds, found or contents(state), after.seconds - before.seconds, after.orders - before.orders)


def fold_turn(made: Path, place: Path, tune: Path, executor: Executor) -> Turn:
    """A fold into a copy of the state `made`."""

    def fold(merge: api.Merge) -> dict[str, str]:
        outcome = merge.fold(tune)
        assert outcome.fate == "folded", outcome.message
        return {}

    shutil.copytree(made, place)
    try:
        return turn(place, executor, fold)
    finally:
        shutil.rmtree(place)


def export_turn(state: Path, place: Path, executor: Executor) -> Turn:
    """An export of a state; hashing what it wrote is not timed."""
    found = turn(state, executor, lambda merge: {"": str(merge.export(place))})
    try:
        return found._replace(found=weights(place))
    finally:
        shutil.rmtree(place)


def compared(what: str, executors: dict[str, Executor], repeats: int, one: Callable[[Executor], Turn]) -> None:
    """Takes turns, and says how long they took."""
    expected = one(executors["ray, 2"]).found  # workers have started then
    turns: dict[str, list[Turn]] = {name: [] for name in executors}
    for _ in range(repeats):
        for name, executor in executors.items():
            turns[name].append(one(executor))
            assert turns[name][-1].found == expected, f"{name}: other bits"
    print(f"{what}, medians of {repeats}, the same bits; {turns['ray, 2'][0].orders} orders")
    for name, each in turns.items():
        pairs = zip(each, turns[f"local, {name[-1]}"], strict=True)
        ratio = statistics.median(mine.seconds / beside.seconds for mine, beside in pairs)
        on = f", on workers {statistics.median(one.spent for one in each):.1f} s" if name.startswith("ray") else ""
        print(
            f"  {name}: {statistics.median(one.seconds for one in each):.1f} s, {ratio:.2f} times local{on}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs="+", choices=["fold", "export"], default=["fold", "export"])
    parser.add_argument("--rules", nargs="+", default=["task-arithmetic", "iso-c"])
    parser.add_argument(
        "--order", type=int, default=64 << 20, help="bytes of an order: a small model has few of 256 MB"
    )
    args = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary, cluster(1, 1) as nodes:
        work = Path(temporary)
        base = models.base(work / "base", shapes=models.big_shapes(args.gigabytes, layers=24))
        tune = models.fine_tune(base, work / "tune", 1)
        size = (base / "model.safetensors").stat().st_size / 1e9
        never = threading.Event()
        executors: dict[str, Executor] = {
            "local, 1": Local(1),
            "local, 2": Local(2),
            "ray, 1": OnRay(RayAsked(nodes.address, workers=1, order=args.order), Local(1), never),
            "ray, 2": OnRay(RayAsked(nodes.address, order=args.order), Local(1), never),
        }
        for rule in args.rules:
            made = work / rule
            making.init(base, made, making.Recipe(rule))
            said = f"{rule}, {size:.2f} GB float32"
            if "fold" in args.work:
                one = partial(fold_turn, made, work / "state", tune)
                compared(f"{said} fold", executors, args.repeats, one)
            if "export" in args.work:
                with api.Merge(Settings(state=made, workers=1), write=True) as merge:
                    assert merge.fold(tune).fate == "folded"
                compared(f"{said} export", executors, args.repeats, partial(export_turn, made, work / "export"))
            shutil.rmtree(made)


if __name__ == "__main__":
    main()
