"""Folds of a model that is streamed, cached or downloaded, beside the same fold from a folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from continual import api, making
from tests.campaigns.bench.hub.one_fold import Seen, measure, medians
from tests.helpers import models
from tests.helpers.hubs import publish
from tests.loopback import Hub
from tests.loopback.faults import Fault, Policy, Slow, Stall

RULES: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "iso-c": {},
    "opcm": {},
    "ties": {},
    "drop": {"before": ["drop:rate=0.9"]},
}
WAYS = ("folder", "stream", "cache", "download")
LATENCY, RATE = 0.03, 50e6
MB = 1e6


@dataclass(frozen=True)
class World:
    """A base, a fine-tune that states have folded and one that is measured, which is on the Hub as well."""

    work: Path
    hub: Hub
    base: Path
    models: tuple[Path, Path]
    shapes: Mapping[str, tuple[int, ...]]
    repo: str
    workers: int

    @property
    def sizes(self) -> list[int]:
        return [2 * torch.Size(shape).numel() for shape in self.shapes.values()]

    def state(self, rule: str) -> Path:
        """A state that has folded the first fine-tune."""
        state = self.work / f"state-{rule}"
        if not state.exists():
            options = RULES[rule]
            making.init(self.base, state, making.Recipe(rule=rule if rule != "drop" else "mean", options=options))
            with api.open(state, write=True) as found:
                assert found.fold(self.models[0]).fate == "folded"
        return state


def world(work: Path, hub: Hub, name: str, shapes: Mapping[str, tuple[int, ...]], workers: int) -> World:
    work = work / name
    base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
    tuned = [models.fine_tune(base, work / f"ft{number}", number) for number in range(2)]
    publish(hub, f"org/{name}", tuned[1])
    return World(work, hub, base, (tuned[0], tuned[1]), shapes, f"org/{name}", workers)


def compare(world: World, rules: Sequence[str], ways: Sequence[str], repeat: int) -> None:
    """Rows for every rule and way, the ways in turn."""
    size, largest = sum(world.sizes), 2 * max(world.sizes)
    print(
        f"{size / 1e9:.2f} GB bf16, {len(world.sizes)} tensors, the largest {largest / MB:.0f} MB as "
        f"float32; medians of {repeat}"
    )
    columns = {
        "passes": 7,
        "read": 7,
        "req/GB": 7,
        " | peak": 9,
        "-folder": 8,
        "-start": 8,
        "-largest": 9,
        " | wall s": 10,
        "/folder": 8,
    }
    columns |= {"cpu s": 7, "/fold.": 8, "/downl.": 8, "server": 7, " | written": 11, "outside": 9}
    print(" " * 15 + "".join(name.rjust(width) for name, width in columns.items()))
    for rule in rules:
        runs: dict[str, list[Seen]] = {way: [] for way in ways}
        state = world.state(rule)
        for _ in range(repeat):
            for way in ways:
                runs[way].append(measure(world.hub, world.work, state, world.models[1], world.repo, way, world.workers))
        shutil.rmtree(state)
        found = {way: medians(seen) for way, seen in runs.items()}
        there = found["folder"]
        for way, seen in found.items():
            over = seen.peak - seen.before
            gone = f"{seen.wall / found['download'].wall:8.2f}" if "download" in found else f"{'':8}"
            print(
                f"{rule:6}{way:9}{seen.passes:7.2f}"
                f"{seen.sent / size / seen.passes:7.3f}{seen.requests / (size / 1e9):7.0f} | "
                f"{seen.peak / MB:6.0f}{(seen.peak - there.peak) / MB:+8.1f}{over / MB:8.1f}"
                f"{(over - largest) / MB:+9.1f} | "
                f"{seen.wall:7.2f}{seen.wall / there.wall:8.2f}{seen.cpu:7.2f}{seen.cpu / there.cpu:8.2f}{gone}"
                f"{seen.server:7.2f} | "
                f"{seen.written / seen.state:7.3f}x{seen.outside / MB:6.1f} MB"
                + (
                    f"  ({seen.sent / size / (seen.passes + seen.sampled):.3f} a pass with the sample counted whole)"
                    if seen.sampled and seen.sent
                    else ""
                )
                + (f"  (client {seen.client / MB:.0f} MB)" if seen.client and rule == rules[0] else ""),
                flush=True,
            )
        spread = [seen.wall for seen in runs["folder"]]
        print(f"{'':6}noise: the folder's wall time {min(spread):.2f} to {max(spread):.2f} s")


def always(fault: Fault) -> Policy:
    return lambda _: fault


def folds(work: Path, hub: Hub, args: argparse.Namespace) -> None:
    made = world(work, hub, "big", models.big_shapes(args.gigabytes, layers=36), args.workers)
    compare(made, args.rules, [way for way in WAYS if way == "folder" or way in args.ways], args.repeat)
    shutil.rmtree(made.work)


def latency(work: Path, hub: Hub, args: argparse.Namespace) -> None:
    made = world(work, hub, "far", models.big_shapes(args.gigabytes / 4, layers=36), args.workers)
    faults: Mapping[str, Policy | None] = {
        "no delay": None,
        f"{LATENCY * 1e3:.0f} ms before every answer": always(Stall(LATENCY)),
        f"{RATE / MB:.0f} MB/s a connection": always(Slow(RATE)),
    }
    for name, policy in faults.items():
        print(f"-- {name}")
        hub.faults = policy
        compare(made, ["mean"], ("folder", "stream", "download"), args.repeat)
        hub.faults = None
    shutil.rmtree(made.work)


def small(work: Path, hub: Hub, args: argparse.Namespace) -> None:
    shapes = {f"model.layers.{n // 10}.mlp.experts.{n % 10}.weight": (50, 100) for n in range(3000)}
    made = world(work, hub, "small", shapes, args.workers)
    for name, policy in (("no delay", None), (f"{LATENCY * 1e3:.0f} ms before every answer", always(Stall(LATENCY)))):
        print(f"-- {name}")
        hub.faults = policy
        compare(made, ["mean"], ("folder", "stream", "download"), args.repeat)
        hub.faults = None
    shutil.rmtree(made.work)
