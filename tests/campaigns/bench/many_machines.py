"""Many machines against one: folds on a Ray cluster beside folds in this process, in one run.

    python -m tests.campaigns.bench.many_machines --gigabytes 1 --repeats 3

The same fine-tune is folded in turns by one thread and by two of this process, and by one worker and by two on a
cluster of two nodes on loopback, that has folded once before: what a cluster costs beyond its start. The bits have to
be the same. Said are wall seconds, and of the cluster also how long orders took on its workers, so that what waits and
what is sent shows.
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
from pathlib import Path

from continual import api, making
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.executors.contract import Executor
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from tests.campaigns.faults.ray_kills import contents
from tests.helpers import models
from tests.helpers.clusters import cluster


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"{os.cpu_count()} cores, {name}, {platform.system()}, load {os.getloadavg()[0]:.0f} at the beginning"


def turn(made: Path, state: Path, tune: Path, executor: Executor) -> tuple[float, dict[str, str], float, int]:
    """One fold: wall seconds, what the state has, seconds of orders on workers, orders."""

    class By(api.Merge):
        @property
        def executor(self) -> Executor:
            return executor

    shutil.copytree(made, state)
    before = FIGURES.seen().all
    with By(Settings(state=state), write=True) as merge:
        assert merge.engine.executor is executor
        began = time.perf_counter()
        outcome = merge.fold(tune)
        seconds = time.perf_counter() - began
    assert outcome.fate == "folded", outcome.message
    after = FIGURES.seen().all
    found = contents(state)
    shutil.rmtree(state)
    return seconds, found, after.seconds - before.seconds, after.orders - before.orders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
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
            _, expected, _, _ = turn(made, work / "state", tune, executors["ray, 2"])  # workers have started then
            walls: dict[str, list[float]] = {name: [] for name in executors}
            spent: dict[str, list[float]] = {name: [] for name in executors}
            for _ in range(args.repeats):
                for name, executor in executors.items():
                    wall, found, seconds, orders = turn(made, work / "state", tune, executor)
                    assert found == expected, f"{name}: other bits"
                    walls[name].append(wall)
                    spent[name].append(seconds)
            print(f"{rule}, {size:.2f} GB float32 fold, medians of {args.repeats}, the same bits; {orders} orders")
            for name, each in walls.items():
                beside = walls[f"local, {name[-1]}"]
                ratio = statistics.median(a / b for a, b in zip(each, beside, strict=True))
                on = f", on workers {statistics.median(spent[name]):.1f} s" if name.startswith("ray") else ""
                print(f"  {name}: {statistics.median(each):.1f} s, {ratio:.2f} times local{on}", flush=True)
            shutil.rmtree(made)


if __name__ == "__main__":
    main()
