"""One fold in a process of its own, from a folder or from the loopback Hub, and what it took."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from continual.service.metrics import peak_memory
from tests.loopback import Hub, environment

ROOT = Path(__file__).parents[4]


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
        needs = merge_.rule.needs
        sampled = 1.0 - needs.measure.share if needs.measure else 0.0  # the first pass alone may see a sample
        passes = sum(stage.startswith("measure ") for stage in stages) - sampled
        seen = Seen(
            peak=peak_memory(),
            before=before,
            client=client - before,
            wall=wall,
            cpu=cpu,
            folding=outcome.report.seconds["total"],
            written=io,
            state=merge_.state.generation_bytes(),
            passes=1 + needs.seeded + passes,
            sampled=sampled,
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
    code = "import json, sys; from tests.campaigns.bench.hub.one_fold import *; worker(Task(**json.loads(sys.argv[1])))"
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
