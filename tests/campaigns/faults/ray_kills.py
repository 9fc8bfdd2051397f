"""Workers of a Ray cluster killed in the middle of folds.

    python -m tests.campaigns.faults.ray_kills --kills 20

Two nodes on loopback. In each fold one worker process that is doing an order gets SIGKILL at a random moment. The merge
has to be bit for bit that of a process alone, every other order is done once, and nothing is left beside it. Then the
driver is killed in the middle of a fold: the state is as before, and its orphans go at the next opening, while workers
may still write.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

from continual import api, making
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from continual.state import State
from tests.helpers import models
from tests.helpers.clusters import cluster

MARK = "CONTINUAL_CAMPAIGN"
ORDER = 4 << 20


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


def kill_one(mark: str, seed: int, killed: list[int], over: threading.Event) -> None:
    """Kills one worker at work, at a random moment."""
    chance = random.Random(seed)
    time.sleep(chance.random() * 2)
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
    kind, good, orders = on_ray(address), 0, None
    for number in range(kills + 1):
        state = work / "state"
        shutil.copytree(made, state)
        before = FIGURES.seen()
        killed: list[int] = []
        over = threading.Event()
        killer = threading.Thread(target=kill_one, args=(mark, number, killed, over))
        began = time.perf_counter()
        if number:
            killer.start()
        with kind(Settings(state=state), write=True) as merge:
            outcome = merge.fold(tune)
        seconds = time.perf_counter() - began
        over.set()
        if number:
            killer.join()
        done = FIGURES.seen().all.orders - before.all.orders
        gone = FIGURES.seen().lost - before.lost
        orders = done if orders is None else orders
        same = outcome.fate == "folded" and contents(state) == expected
        clean = len(list((state / "generations").iterdir())) == 1
        fine = same and clean and done == orders and gone <= len(killed)
        good += bool(number) and fine
        print(
            f"fold {number}: {len(killed)} killed, {gone} orders lost, {done} done of {orders}, "
            f"{'the same bits' if same else 'OTHER BITS'}, {seconds:.1f} s{'' if fine else ': WRONG'}",
            flush=True,
        )
        shutil.rmtree(state)
    print(f"{good} of {kills} kills cost the orders of the worker alone")
    assert good == kills


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
    args = parser.parse_args()
    mark = f"{os.getpid()}"
    os.environ[MARK] = mark
    with tempfile.TemporaryDirectory() as temporary, cluster(1, 1) as nodes:
        work = Path(temporary)
        base = models.base(work / "base", shapes=models.big_shapes(0.04, layers=8))
        worker_kills(work, base, nodes.address, mark, args.kills, args.rule)
        driver_kills(work, nodes.address, args.drivers)


if __name__ == "__main__":
    main()
