"""Workers of a Ray cluster killed in the middle of folds.

    python -m tests.campaigns.faults.ray_kills --kills 20

Two nodes on loopback. In each fold one worker process that is doing an order gets SIGKILL at a random moment. The merge
has to be bit for bit that of a process alone, every other order is done once, and nothing is left beside it. Then the
second node is killed with all its processes, and another takes its place; so it goes for the merge too. Then the driver
is killed in the middle of a fold: the state is as before, and its orphans go at the next opening, while workers may
still write.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from continual import api, making
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from continual.state import State
from tests.helpers import models
from tests.helpers.clusters import RayNodes, cluster

MARK = "CONTINUAL_CAMPAIGN"
ORDER = 4 << 20


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Path, Path, RayNodes, str]]:
    """A directory, a base in it, and a cluster whose processes have the mark that comes last."""
    mark = os.environ[MARK] = f"{os.getpid()}"
    with tempfile.TemporaryDirectory() as temporary, cluster(1, 1) as nodes:
        base = models.base(Path(temporary) / "base", shapes=models.big_shapes(0.04, layers=8))
        yield Path(temporary), base, nodes, mark


def working(mark: str) -> list[int]:
    """The worker processes of the cluster with this mark that are doing an order."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            title, environment = (directory / "cmdline").read_bytes(), (directory / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::continual") and f"{MARK}={mark}".encode() in environment:
            found.append(int(directory.name))
    return found


def kill_one(mark: str, chance: random.Random, within: float, killed: list[int], over: threading.Event) -> None:
    """Kills one worker at work, at a random moment of the first so many seconds, or the next that there is."""
    time.sleep(chance.random() * within)
    while not over.is_set() and not killed:
        if at_work := working(mark):
            victim = chance.choice(at_work)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(victim)
        time.sleep(0.002)


def contents(state: Path) -> dict[str, str]:
    """The files of the generation in force, by their hashes."""
    with State.open(state) as found:
        generation = state / "generations" / str(found.ledger.head.generation)
    return {
        str(path.relative_to(generation)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in generation.rglob("*")
        if path.is_file()
    }


def on_ray(address: str) -> type[api.Merge]:
    """A merge whose orders are small: a fold of a small model has many."""
    executor = OnRay(RayAsked(address, order=ORDER), Local(1), threading.Event())

    class OnCluster(api.Merge):
        @property
        def executor(self) -> OnRay:
            return executor

    return OnCluster


def worker_kills(work: Path, base: Path, address: str, mark: str, kills: int, rule: str) -> None:
    made = work / "made"
    making.init(base, made, making.Recipe(rule))
    tune = models.fine_tune(base, work / "tune", 1)
    shutil.copytree(made, work / "alone")
    with api.Merge(Settings(state=work / "alone", workers=1), write=True) as merge:
        merge.fold(tune)
    expected = contents(work / "alone")
    kind, good, orders, seconds = on_ray(address), 0, None, 0.0
    within = 0.0
    for number in range(-1, kills + 1):  # the first connects, the second says how long a fold takes
        state = work / "state"
        shutil.copytree(made, state)
        before = FIGURES.seen()
        killed: list[int] = []
        over = threading.Event()
        within = 0.3 * seconds if number < 2 else within
        killer = threading.Thread(target=kill_one, args=(mark, random.Random(number), within, killed, over))
        began = time.perf_counter()
        if number > 0:
            killer.start()
        with kind(Settings(state=state), write=True) as merge:
            outcome = merge.fold(tune)
        seconds = time.perf_counter() - began
        over.set()
        if number > 0:
            killer.join()
        done = FIGURES.seen().all.orders - before.all.orders
        gone = FIGURES.seen().lost - before.lost
        orders = done if orders is None else orders
        same = outcome.fate == "folded" and contents(state) == expected
        clean = len(list((state / "generations").iterdir())) == 1
        fine = same and clean and done == orders and gone <= len(killed) == (number > 0)
        good += number > 0 and fine
        print(
            f"fold {number}: {len(killed)} killed, {gone} orders lost, {done} done of {orders}, "
            f"{'the same bits' if same else 'OTHER BITS'}, {seconds:.1f} s{'' if fine else ': WRONG'}",
            flush=True,
        )
        shutil.rmtree(state)
    print(f"{good} of {kills} kills cost the orders of the worker alone")
    assert good == kills


def node_kills(work: Path, nodes: RayNodes, kills: int) -> None:
    """Kills the second node with all that runs there, at a random moment of a fold; another joins afterwards."""
    state, chance, kind = work / "state", random.Random(1), on_ray(nodes.address)
    expected = contents(work / "alone")
    for number in range(kills):
        shutil.copytree(work / "made", state)
        before = FIGURES.seen()

        def kill(state: Path = state) -> None:
            while not list((state / "generations").glob("*.attempts/*")):
                time.sleep(0.005)
            time.sleep(chance.random())
            nodes.kill_last()

        killer = threading.Thread(target=kill)
        killer.start()
        began = time.perf_counter()
        with kind(Settings(state=state), write=True) as merge:
            outcome = merge.fold(work / "tune")
        seconds = time.perf_counter() - began
        killer.join()
        seen = FIGURES.seen()
        same = outcome.fate == "folded" and contents(state) == expected
        print(
            f"node {number}: {seen.lost - before.lost} orders lost, {seen.all.orders - before.all.orders} done, "
            f"{'the same bits' if same else 'OTHER BITS'}, {seconds:.1f} s",
            flush=True,
        )
        assert same
        assert len(list((state / "generations").iterdir())) == 1
        shutil.rmtree(state)
        nodes.start(1)


DRIVER = """
import sys
from continual.config import Settings
from tests.campaigns.faults.ray_kills import on_ray
with on_ray(sys.argv[1])(Settings(state=sys.argv[2]), write=True) as merge:
    print("begun", flush=True)
    merge.fold(sys.argv[3])
"""


def driver_kills(work: Path, address: str, kills: int) -> None:
    state, tune = work / "made", work / "tune"
    chance = random.Random(0)
    for number in range(kills):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, str(state), str(tune)], stdout=subprocess.PIPE
        )
        assert driver.stdout is not None
        driver.stdout.readline()
        while not (begun := list((state / "generations").glob("*.attempts/*"))) and driver.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.5)
        driver.kill()
        driver.wait()
        with State.open(state, write=True) as found:
            assert found.ledger.head.seq == 0, "a fold that was killed is not there"
            orphans = len(found.orphans)
        time.sleep(3)
        with State.open(state, write=True):
            left = list((state / "generations").iterdir())
        print(
            f"driver {number}: killed with {len(begun)} attempts begun; {orphans} orphans, then {len(left)}", flush=True
        )
        assert left == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drivers", type=int, default=3)
    parser.add_argument("--rule", default="tsv-m")
    parser.add_argument("--nodes", type=int, default=3)
    args = parser.parse_args()
    with two_nodes() as (work, base, nodes, mark):
        worker_kills(work, base, nodes.address, mark, args.kills, args.rule)
        node_kills(work, nodes, args.nodes)
        driver_kills(work, nodes.address, args.drivers)


if __name__ == "__main__":
    main()
