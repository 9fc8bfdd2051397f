"""What work costs beyond one process and one disk, in one table: on a Ray cluster, and on an object store.

    python -m tests.campaigns.bench.many --gigabytes 1 --repeats 3 [--work fold export] [--json FIGURES.json]
    python -m tests.campaigns.bench.many --paper FIGURES.json

The same fine-tune is folded in turns by one thread and by two of this process, by one worker and by two of a cluster of
two nodes on loopback, which has folded once before (what a cluster costs beyond its start), and by two threads into a
state on an object store on loopback. `half` is the fold of a model that lacks every second tensor: those are linked on
a disk and copied by the store. Then the merge is exported, each time as by who does not know how long it is, and the
states are opened and verified. The bits have to be the same everywhere.

A cell is the median of wall seconds, with the median of its ratios to the same threads of this process with the state
on the disk; in brackets what it worked, in seconds: the CPU of this process, or orders on the workers of the cluster.
`--late` puts so many milliseconds before each answer of the store, as one in the same region has.

`--paper` prints the table on 405 B parameters of ops/docs/many-machines.md from the figures that `--json` wrote: what
an element takes is what orders of one worker took for it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.executors.contract import Executor
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from continual.hub import Hub
from continual.state import State, storing
from continual.state.verify import verify
from continual.stores import Where, where
from tests.campaigns.bench import on_paper
from tests.campaigns.faults.ray_exports import weights
from tests.helpers import models, object_stores
from tests.helpers.clusters import cluster
from tests.helpers.cutting import cutting

WORK = ("fold", "half", "export", "open", "verify")
BESIDE = {"local, 2": "local, 1", "ray, 1": "local, 1", "ray, 2": "local, 2", "store, 2": "local, 2"}
"""With what each way is compared."""


class Way(NamedTuple):
    """Who does the work, and below which place the state lies."""

    executor: Executor
    root: Where


class Turn(NamedTuple):
    """One piece of work: wall seconds, seconds worked, orders, and what came of it by a hash."""

    seconds: float
    worked: float
    orders: int
    found: str


Ways = Mapping[str, Way]
Turns = dict[str, list[Turn]]


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, {name}, {platform.system()}, torch {torch.__version__}, load {load:.0f}"


def opened(state: Where, executor: Executor, client: Hub | None = None) -> api.Merge:
    """A merge whose work `executor` does; `client` asks the Hub."""

    class By(api.Merge):
        @property
        def executor(self) -> Executor:
            return executor

    return By(Settings(state=state, keep=1, missing="unchanged"), write=True, client=client)


def timed(work: Callable[[], str]) -> Turn:
    """What some work took, and what it gave."""
    before, clock, began = FIGURES.seen().all, time.process_time(), time.perf_counter()
    found = work()
    seconds, cpu, after = time.perf_counter() - began, time.process_time() - clock, FIGURES.seen().all
    orders = after.orders - before.orders
    return Turn(seconds, after.seconds - before.seconds if orders else cpu, orders, found)


def sums(state: State) -> str:
    """A hash of every accumulator in force."""
    found, made = hashlib.sha256(), state.format
    for spec in made.tensors:
        for slot in made.slots[spec.name]:
            found.update(state.read(spec.name, slot).tobytes())
    return found.hexdigest()


def fold(way: Way, base: Path, rule: str, tunes: tuple[Path, ...], number: str) -> Turn:
    """The fold of the last of `tunes` into a state that has the others."""
    place = way.root / f"{rule}-{number}"
    making.init(base, place, making.Recipe(rule))
    *others, last = tunes

    def folded(merge: api.Merge, tune: Path) -> str:
        outcome = merge.fold(tune)
        assert outcome.fate == "folded", outcome.message
        return ""

    with opened(place, way.executor) as merge:
        for tune in others:
            folded(merge, tune)
        found = timed(partial(folded, merge, last))._replace(found=sums(merge.state))
    removed(place)
    return found


def removed(place: Where) -> None:
    """Deletes a state."""
    storing.remove_tree(place)


def export(way: Way, state: Where, place: Path) -> Turn:
    """An export; hashing what it wrote is not timed."""
    with opened(state, way.executor) as merge:
        found = timed(lambda: str(merge.export(place)))
    found = found._replace(found=str(weights(place)))
    shutil.rmtree(place)
    return found


def looked(state: Where, through: bool) -> Turn:
    """A state opened, and read `through`."""

    def look() -> str:
        with State.open(state) as found:
            return str(verify(found)) if through else ""

    return timed(look)


def compared(what: str, ways: Ways, repeats: int, one: Callable[[str, Way], Turn]) -> Turns:
    """Takes turns."""
    turns: Turns = {name: [] for name in ways}
    for name, way in ways.items():  # workers start, and what is read lies in memory
        expected = one(name, way).found
    for _ in range(repeats):
        for name, way in ways.items():
            turns[name].append(one(name, way))
            assert turns[name][-1].found == expected, f"{what}, {name}: other bits"
    return turns


def cell(turns: Turns, name: str) -> str:
    """What the table says of one way."""
    if name not in turns:
        return ""
    mine = turns[name]
    ratio = ""
    if (beside := BESIDE.get(name)) in turns:
        pairs = zip(mine, turns[str(beside)], strict=True)
        ratio = f" {statistics.median(a.seconds / max(b.seconds, 1e-9) for a, b in pairs):.2f}×"
    worked = statistics.median(one.worked for one in mine)
    return f"{statistics.median(one.seconds for one in mine):.2f}{ratio} ({worked:.2f})"


def measured(args: argparse.Namespace, nodes: str, work: Path, server: str) -> dict[str, Turns]:
    """All rows of the table, by what was done."""
    os.environ.update(object_stores.environment(server))
    base = models.base(work / "base", shapes=models.big_shapes(args.gigabytes, layers=24))
    first, second = (models.fine_tune(base, work / f"tune-{n}", n) for n in (1, 2))
    half = models.write(
        work / "half", {k: v + 1e-4 for k, v in sorted(load_file(second / "model.safetensors").items())[::2]}
    )
    never, disk, store = threading.Event(), work / "disk", where(f"s3://{object_stores.BUCKET}/state")
    disk.mkdir()
    ways = {
        "local, 1": Way(Local(1), disk),
        "local, 2": Way(Local(2), disk),
        "ray, 1": Way(OnRay(RayAsked(nodes, workers=1, order=args.order), Local(1), never), disk),
        "ray, 2": Way(OnRay(RayAsked(nodes, order=args.order), Local(1), never), disk),
        "store, 2": Way(Local(2), store),
    }
    counter = iter(range(1 << 30))
    found: dict[str, Turns] = {}
    for rule in args.rules:
        for what, tunes in (("fold", (first,)), ("half", (first, half))):
            if what in args.work:
                found[f"{what}, {rule}"] = compared(
                    what, ways, args.repeats, lambda _, way, t=tunes, r=rule: fold(way, base, r, t, str(next(counter)))
                )
        if not {"export", "open", "verify"} & set(args.work):
            continue
        states = {}
        for root in (disk, store):
            states[root] = root / f"{rule}-kept"
            making.init(base, states[root], making.Recipe(rule))
            with opened(states[root], Local(2)) as merge:
                assert merge.fold(first).fate == "folded"
        if "export" in args.work:
            found[f"export, {rule}"] = compared(
                "export", ways, args.repeats, lambda _, way, s=states: export(way, s[way.root], work / "export")
            )
        looks = {name: ways[name] for name in ("local, 2", "store, 2")}
        for what in [what for what in ("open", "verify") if what in args.work]:
            found[f"{what}, {rule}"] = compared(
                what, looks, args.repeats, lambda _, way, s=states, w=what: looked(s[way.root], w == "verify")
            )
        removed(states[disk])
    return found


def told(args: argparse.Namespace, found: dict[str, Turns], elements: int) -> None:
    """Prints the table, and writes the figures."""
    late = f", {args.late:g} ms before each answer of the store" if args.late else ""
    print(f"{elements * 4 / 1e9:.2f} GB float32, medians of {args.repeats}, {args.store}{late}; the same bits")
    names = ["local, 1", *BESIDE]
    print("| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for row, turns in found.items():
        print(f"| {row} | " + " | ".join(cell(turns, name) for name in names) + " |")
    if args.json is not None:
        body = {
            row: {name: [one._asdict() for one in each] for name, each in turns.items()} for row, turns in found.items()
        }
        args.json.write_text(json.dumps({"elements": elements, "rows": body}, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--rules", nargs="+", default=["task-arithmetic", "iso-c"])
    parser.add_argument("--store", choices=("moto", "seaweedfs"), default="seaweedfs")
    parser.add_argument("--late", type=float, default=0.0, help="milliseconds before each answer of the store")
    parser.add_argument(
        "--order", type=int, default=64 << 20, help="bytes of an order: a small model has few of 256 MB"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--paper", type=Path, help="print the table on 405 B from such a file, and measure nothing")
    args = parser.parse_args()
    if args.paper is not None:
        print(on_paper.table(json.loads(args.paper.read_text("utf-8"))))
        return
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary, cluster(1, 1) as nodes, contextlib.ExitStack() as stack:
        work = Path(temporary)
        server = stack.enter_context(object_stores.serving(args.store, work))
        if args.late:
            proxy = stack.enter_context(cutting(server))
            proxy.decide, proxy.late = lambda _method, _path: "late", args.late / 1000
            server = proxy.address
        found = measured(args, nodes.address, work, server)
        told(args, found, (work / "base/model.safetensors").stat().st_size // 4)


if __name__ == "__main__":
    main()
