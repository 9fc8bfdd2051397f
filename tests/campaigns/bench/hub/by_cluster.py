"""Folds of a model on the Hub by the workers of a Ray cluster of two nodes on loopback, beside the same fold by threads
of one process: a model in one file, which is cut into orders, and in shards, each of which is one order.

The Hub runs in a process of its own. A cell is the median of wall seconds, the median of its ratios to as many threads
of one process, and in brackets how many times the size of the model was downloaded. The bits have to be the same."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from continual import making
from continual.executors.contract import Executor
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from continual.hub import Hub as Client
from tests.campaigns.bench.hub.compared import RULES
from tests.campaigns.bench.many import machine, opened, removed, sums
from tests.helpers import hubs, models
from tests.helpers.clusters import cluster
from tests.loopback import Hub, serving
from tests.loopback.faults import Slow

BESIDE = {"ray, 1": "local, 1", "ray, 2": "local, 2"}
SHARDS = 12
ORDER = 64 << 20


class HubTurn(NamedTuple):
    """One fold: wall seconds, bytes that the Hub sent, and the merge by a hash."""

    seconds: float
    sent: int
    found: str


At = tuple[Connection, Client]
"""The process that serves the Hub, and who asks it."""


def by_cluster(work: Path, _hub: Hub, args: argparse.Namespace) -> None:
    base = models.base(work / "base", shapes=models.big_shapes(args.gigabytes, layers=24))
    whole = models.fine_tune(base, work / "whole", 1)
    forms = {"one file": whole, f"{SHARDS} shards": hubs.sharded(whole, work / "sharded", SHARDS)}
    ours, theirs = multiprocessing.Pipe()
    served = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, forms, args.rate))
    served.start()
    try:
        client = Client(endpoint=ours.recv())
        with cluster(1, 1) as nodes:
            _compare(work, base, nodes.address, (ours, client), args)
    finally:
        ours.send("stop")
        served.join()


def serve(link: Connection, forms: Mapping[str, Path], rate: float) -> None:
    """A Hub with the models; says how many bytes it has sent since it was asked last."""
    with serving() as hub:
        for number, directory in enumerate(forms.values()):
            hubs.publish(hub, f"org/model{number}", directory)
        if rate:
            hub.faults = lambda request: Slow(rate * 1e6) if request.origin == "cdn" else None
        link.send(hub.endpoint)
        while link.recv() == "sent":
            link.send(hub.journal.sent())
            hub.journal.clear()


def _compare(work: Path, base: Path, address: str, there: At, args: argparse.Namespace) -> None:
    size, never = (work / "whole/model.safetensors").stat().st_size, threading.Event()
    ways: dict[str, Executor] = {
        "local, 1": Local(1),
        "local, 2": Local(2),
        "ray, 1": OnRay(RayAsked(address, workers=1, order=ORDER), Local(1), never),
        "ray, 2": OnRay(RayAsked(address, order=ORDER), Local(1), never),
    }
    limit = f", {args.rate:g} MB/s a connection" if args.rate else ""
    print(f"{machine()}\n{size / 1e9:.2f} GB float32, orders of {ORDER >> 20} MB, medians of {args.repeat}{limit}")
    print("| | " + " | ".join(ways) + " |\n|" + "---|" * (len(ways) + 1))
    for rule in args.rules:
        for number, form in enumerate(("one file", f"{SHARDS} shards")):
            turns: dict[str, list[HubTurn]] = {name: [] for name in ways}
            for turn in range(args.repeat + 1):  # in the first workers start
                for name, executor in ways.items():
                    one = _fold(work / "state", base, rule, f"hf://org/model{number}", executor, there)
                    turns[name] += [one] if turn else []
            assert len({one.found for each in turns.values() for one in each}) == 1, "other bits"
            cells = [_cell(turns, name, size) for name in ways]
            print(f"| {rule}, {form} | " + " | ".join(cells) + " |", flush=True)


def _fold(state: Path, base: Path, rule: str, repo: str, executor: Executor, there: At) -> HubTurn:
    made = making.Recipe("mean" if rule == "drop" else rule, options=RULES[rule])
    making.init(base, state, made)
    link, client = there
    link.send("sent")
    link.recv()
    with opened(state, executor, client) as merge:
        began = time.perf_counter()
        outcome = merge.fold(repo)
        seconds = time.perf_counter() - began
        assert outcome.fate == "folded", outcome.message
        found = sums(merge.state)
    link.send("sent")
    sent = int(link.recv())
    removed(state)
    shutil.rmtree(state, ignore_errors=True)
    return HubTurn(seconds, sent, found)


def _cell(turns: Mapping[str, list[HubTurn]], name: str, size: int) -> str:
    mine, ratio = turns[name], ""
    if name in BESIDE:
        pairs = zip(mine, turns[BESIDE[name]], strict=True)
        ratio = f" {statistics.median(a.seconds / b.seconds for a, b in pairs):.2f}×"
    sent = statistics.median(one.sent for one in mine) / size
    return f"{statistics.median(one.seconds for one in mine):.2f}{ratio} ({sent:.2f})"
