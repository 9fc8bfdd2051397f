"""What the Hub costs: folding a model that is streamed against the same fold from a folder, candidates refused by their
headers, and a webhook's way to a commit.

    python -m tests.campaigns.bench.hub [folds] [latency] [small] [webhook] [refused] [--gigabytes 1.0] [--repeat 3]
    [--work DIR]

The loopback Hub (tests/loopback) runs in this process, every fold in one of its own with an empty HF_HOME, TMPDIR, HOME
and working directory. The ways of one rule are run in turn, each `--repeat` times, and medians shown; wall time has the
server's in it, which shares the machine: its CPU is shown beside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from continual import api, making
from continual.service.metrics import peak_memory
from tests.helpers import models
from tests.helpers.hubs import BASE, card, merge, publish
from tests.helpers.services import daemon, until, url
from tests.loopback import Hub, environment, serving
from tests.loopback.faults import Fault, Policy, Slow, Stall
from tests.loopback.webhooks import post

ROOT = Path(__file__).parents[3]
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


# One fold, in a process of its own


@dataclass(frozen=True)
class Task:
    """A fold to measure: `way` is how the model comes: from a `folder`, by `stream` or `cache`, or by a `download` and
    then from the folder that made."""

    state: str
    model: str
    way: str
    workers: int


@dataclass(frozen=True)
class Seen:
    """What a fold took. Bytes and seconds; `client`: what the Hub's client took in memory before the fold, `passes`:
    over the candidate's tensors."""

    peak: int
    before: int
    client: int
    wall: float
    cpu: float
    folding: float
    written: int
    state: int
    passes: float
    sampled: float
    requests: int = 0
    sent: int = 0
    server: float = 0.0
    outside: int = 0
    files: int = 0


def resident() -> int:
    """VmRSS of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def written() -> int:
    """Bytes this process has had written to disks."""
    with open("/proc/self/io", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def worker(task: Task) -> None:
    """Folds, and prints what it took."""
    import continual

    stages: set[str] = set()
    read = task.way if task.way in ("stream", "cache") else "stream"
    with continual.open(task.state, write=True, workers=task.workers, hub={"read": read}) as merge_:
        assert merge_.engine.base.specs
        before = client = resident()
        if task.way != "folder":
            assert merge_.places.hub.api
            client = resident()
        cpu, wall, io = time.process_time(), time.perf_counter(), written()
        model = downloaded(task.model) if task.way == "download" else task.model
        outcome = merge_.fold(model, progress=lambda stage, *_: stages.add(stage))
        wall, cpu, io = time.perf_counter() - wall, time.process_time() - cpu, written() - io
        assert outcome.fate == "folded", outcome.message
        assert outcome.report is not None
        rule = merge_.rule
        shares = (
            [
                rule.measure.share(number, {"missed": 1.0}) if f"measure {number + 1}" in stages else 0.0
                for number in range(rule.measure.passes)
            ]
            if rule.measure
            else []
        )
        seen = Seen(
            peak=peak_memory(),
            before=before,
            client=client - before,
            wall=wall,
            cpu=cpu,
            folding=outcome.report.seconds["total"],
            written=io,
            state=merge_.state.generation_bytes(),
            passes=1 + rule.seeded + sum(shares),
            sampled=sum(1.0 - share for share in shares if 0 < share < 1),
        )
    print(json.dumps(asdict(seen)))


def downloaded(address: str) -> str:
    """All of a repo by the Hub's client, as its users do; where it lies then."""
    from huggingface_hub import HfApi, hf_hub_download

    repo = address.removeprefix("hf://")
    info = HfApi().model_info(repo)
    return str([Path(hf_hub_download(repo, f.rfilename, revision=info.sha)) for f in info.siblings or ()][-1].parent)


def measure(hub: Hub, work: Path, state: Path, model: Path, repo: str, way: str, workers: int) -> Seen:
    """One fold in a fresh process with a fresh copy of the state, and what the Hub saw of it."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    for name in ("hf", "tmp", "home", "cwd"):
        (run / name).mkdir(parents=True)
    shutil.copytree(state, run / "state", copy_function=shutil.copyfile)
    os.sync()
    (model / "model.safetensors").read_bytes()  # into the page cache, for those who read it there
    task = Task(str(run / "state"), str(model) if way == "folder" else f"hf://{repo}", way, workers)
    own = environment(hub, run) | {"HOME": str(run / "home"), "TMPDIR": str(run / "tmp"), "PYTHONPATH": str(ROOT)}
    hub.journal.clear()
    cpu = time.process_time()
    code = "import json, sys; from tests.campaigns.bench.hub import *; worker(Task(**json.loads(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(task))], env=own, cwd=run / "cwd", capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{task}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout)
    outside = [f for f in run.rglob("*") if f.is_file() and not f.is_symlink() and not f.is_relative_to(run / "state")]
    found |= {"requests": len(hub.journal), "sent": hub.journal.sent(origin="cdn"), "server": time.process_time() - cpu}
    found |= {"outside": sum(f.stat().st_size for f in outside), "files": len(outside)}
    shutil.rmtree(run)
    return Seen(**found)


def medians(runs: Sequence[Seen]) -> Seen:
    return Seen(**{key: statistics.median([asdict(run)[key] for run in runs]) for key in asdict(runs[0])})


# What is folded


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


# From a webhook to a commit


def webhook(work: Path, hub: Hub, args: argparse.Namespace) -> None:
    """A real daemon that polls once an hour is told of a new repo: until its commit is on disk, less the fold's own
    seconds."""
    work = work / "webhook"
    base = models.base(work / "base")
    tuned = [models.fine_tune(base, work / f"ft{number}", number) for number in range(args.pushes)]
    making.init(base, work / "state", making.Recipe(rule="mean"))
    secret = "a-secret-of-the-benchmark"
    own = environment(hub, work) | {"CONTINUAL_WEBHOOK_SECRET": secret}
    flags = ("--hub", "authors=push", "--hub", "settle=0", "--hub", "poll=3600")
    whole, beyond = [], []
    with daemon(work / "state", None, *flags, environment=own) as process:
        address = url(process, work / "state")
        until(lambda: "listening" in (work / "daemon.log").read_text(), "it listens")
        time.sleep(2.0)  # the poll at the start
        for number, directory in enumerate(tuned):
            publish(hub, f"push/ft{number}", directory)
            before = head(work / "state")
            begun = time.perf_counter()
            assert post(f"{address}/webhook", secret, hub.payload(hub.changes[-1])) == 202
            while head(work / "state") == before:
                assert time.perf_counter() - begun < 30, (work / "daemon.log").read_text()[-3000:]
                time.sleep(0.002)
            seconds = time.perf_counter() - begun
            line = until(lambda name=f"push/ft{number}": folded(work / "daemon.log", name), "the log line")
            whole.append(seconds)
            beyond.append(seconds - line)
        process.terminate()
        process.wait()
    print(f"webhook to commit, {len(tuned)} pushes: {spread(whole)}; beyond the fold itself: {spread(beyond)}")


def spread(times: list[float]) -> str:
    """Median and worst of some seconds."""
    return f"median {1e3 * statistics.median(times):.0f} ms, worst {1e3 * max(times):.0f} ms"


def head(state: Path) -> bytes:
    """What names the newest record: the last thing a commit writes."""
    return (state / "HEAD").read_bytes()


def folded(log: Path, model: str) -> float | None:
    """Seconds of the fold of a model as the daemon's log has them."""
    for line in log.read_text().splitlines():
        row = json.loads(line) if line.startswith("{") else {}
        if row.get("event") == "folded" and row.get("model") == model:
            return float(row["seconds"])
    return None


# Refused by headers


def raw(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file of zeros."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = torch.Size(shape).numel() * {"BF16": 2, "F32": 4, "I32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(at)


def refused(work: Path, hub: Hub, _: argparse.Namespace) -> None:
    work = work / "refused"
    layer = {n: s for n, s in models.big_shapes(0.1, layers=60).items() if n.startswith("model.layers.0.")}
    shapes = {n.replace(".0.", f".{number}."): s for number in range(60) for n, s in layer.items()}
    base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
    making.init(base, work / "state", making.Recipe(rule="mean"))
    config = (base / "config.json").read_bytes()
    same = {name: ("BF16", shape) for name, shape in shapes.items()}
    first = next(iter(same))
    wrong = {name.replace("layers", "blocks"): row for name, row in same.items()}
    shards = {
        f"model-{n + 1:05d}-of-00060.safetensors": {k: v for k, v in wrong.items() if f".{n}." in k} for n in range(60)
    }
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    single = "model.safetensors"
    factors = {
        f"base_model.model.h.{n}.attn.lora_{x}.weight": ("F32", (64, 512) if x == "A" else (512, 64))
        for n in range(24)
        for x in "AB"
    }
    adapter = {
        "peft_type": "LORA",
        "r": 64,
        "lora_alpha": 64,
        "target_modules": ["attn"],
        "base_model_name_or_path": "other/base",
    }
    cases: dict[str, Callable[[], Mapping[str, bytes]]] = {
        "wrong shape": lambda: {single: raw(same | {first: ("BF16", (8, 8))})},
        "wrong dtype": lambda: {single: raw(same | {first: ("I32", shapes[first])})},
        "adapter of another base": lambda: {
            "adapter_model.safetensors": raw(factors),
            "adapter_config.json": json.dumps(adapter).encode(),
        },
        "pickle only": lambda: {"pytorch_model.bin": bytes(20_000_000)},
        "60 shards of another base": lambda: (
            {name: raw(part) for name, part in shards.items()}
            | {"model.safetensors.index.json": json.dumps(index).encode()}
        ),
        "20,000 names": lambda: {
            single: raw({f"model.layers.{n}.mlp.experts.down.weight": ("BF16", (64,)) for n in range(20_000)})
        },
        "100,000 names": lambda: {
            single: raw({f"model.layers.{n}.mlp.experts.down.weight": ("BF16", (64,)) for n in range(100_000)})
        },
    }
    with merge(work / "state", hub) as ours:
        for number, (name, files) in enumerate(cases.items()):
            repo, made = f"no/n{number}", files()
            hub.commit(repo, {**made, "config.json": config, "README.md": card(BASE)})
            hub.journal.clear()
            begun = time.perf_counter()
            outcome = ours.fold(f"hf://{repo}")
            seconds = time.perf_counter() - begun
            assert outcome.fate == "refused", outcome
            total, header = (
                hub.journal.sent(origin=""),
                sum(int.from_bytes(f[:8], "little") for n, f in made.items() if n.endswith(".safetensors")),
            )
            print(
                f"{name:26} {total / 1e3:9.1f} kB ({hub.journal.sent(origin='api') / 1e3:.1f} of the API; "
                f"headers {header / 1e3:.1f} kB, "
                f"files {sum(map(len, made.values())) / MB:.1f} MB), {len(hub.journal)} requests, "
                f"{seconds:.2f} s: {outcome.reason}" + ("" if total < 1e6 else "  MORE THAN 1 MB"),
                flush=True,
            )


PARTS: Mapping[str, Callable[[Path, Hub, argparse.Namespace], None]] = {
    "refused": refused,
    "webhook": webhook,
    "small": small,
    "latency": latency,
    "folds": folds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model in bf16")
    parser.add_argument("--repeat", type=int, default=3, help="folds of each rule and way")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--workers", type=int, default=0, help="tensors at a time; 0: one per core")
    parser.add_argument("--pushes", type=int, default=20)
    parser.add_argument("--work", type=Path, help="an empty directory; default: a temporary one")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as made, serving() as hub:
        for name in args.parts or PARTS:
            print(f"== {name}", flush=True)
            PARTS[name](args.work or Path(made), hub, args)


if __name__ == "__main__":
    main()
