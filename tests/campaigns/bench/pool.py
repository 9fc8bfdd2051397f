"""What a round costs as the pool grows: the peak memory of one over 4 and over 64 candidates, and the time of scoring
one against reading its bytes once.

    python -m tests.campaigns.bench.pool [--gigabytes 0.2] [--work DIR]

The base is a llama-like model of float32 weights, the candidates are fine-tunes of it, the objective a convex one
(`tests.helpers.quadratic`), so that what is measured is the round and not the model's own activations. Every round is
run in a process of its own; files are in the page cache. CPU seconds, one worker.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import continual
from continual.executors.contract import silent
from continual.objectives import calibration
from continual.selection.active import NONE
from continual.selection.frank_wolfe import MergedVector, Search, SearchSpace
from continual.selection.in_memory import ModelInMemory
from continual.selection.members import Member
from continual.service.metrics import peak_memory
from continual.tensors import open_model
from tests.helpers import models

SIZES, DISTINCT = (4, 64), 4
OBJECTIVE = "tests.campaigns.bench.pool:objective"


def objective(directory: Path, device: torch.device) -> calibration.Given:
    """Two tasks of few rows, whose optimum is the first candidate: ½⟨a, θ − θ*⟩² over some of the weights, which costs
    little beside them."""
    from safetensors.torch import load_file

    from tests.helpers.quadratic import Tree

    model = Tree(load_file(directory / "model.safetensors")).to(device)
    parts = list(model.parameters())
    wanted = [
        p.detach()
        for p in Tree(load_file(directory.parent / "made" / "0" / "model.safetensors")).to(device).parameters()
    ]

    def some(part: torch.Tensor, row: int) -> torch.Tensor:
        return part.reshape(-1)[row::997]

    class Rows:
        count = 240

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def losses(self, rows: list[int]) -> torch.Tensor:
            pairs = [(parts[n], wanted[n]) for n in ((self.seed + row) % len(parts) for row in rows)]
            return torch.stack(
                [0.5 * (some(p, row) - some(w, row)).sum().square() for (p, w), row in zip(pairs, rows, strict=True)]
            )

    return calibration.Given(model, [Rows(0), Rows(1)])


def world(work: Path, gigabytes: float) -> None:
    """A base, and 64 candidates of four different sets of weights."""
    shapes = models.big_shapes(gigabytes / 2, layers=8)  # that many bytes in bf16, twice as many in float32
    base = models.base(work / "base", shapes=shapes)
    for number in range(DISTINCT):
        models.fine_tune(base, work / "made" / str(number), number, size=0.1)
    (work / "pool").mkdir()
    for number in range(max(SIZES)):
        (work / "pool" / f"{number:02d}").symlink_to(work / "made" / str(number % DISTINCT))


def opened(work: Path, size: int) -> continual.Merge:
    """A new state with so many candidates waiting."""
    state = work / f"state-{size}"
    if not state.exists():
        continual.init(work / "base", state, continual.Recipe(rule="mean"))
    merge = continual.open(
        state, write=True, workers=1, device="cpu", select="relevance", objective=OBJECTIVE, rounds={"steps": 2}
    )
    for path in sorted((work / "pool").iterdir())[:size]:
        merge.fold(path)
    return merge


def worker(work: Path, size: int) -> None:
    """One round; prints what it took."""
    with opened(work, size) as merge:
        began = time.process_time()
        found = merge.round()
        print(
            json.dumps(
                {
                    "peak": peak_memory(),
                    "seconds": time.process_time() - began,
                    "folds": found.folds,
                    "steps": found.steps,
                }
            )
        )


def scoring(work: Path) -> None:
    """CPU seconds of scoring a candidate, and of reading its bytes once in the same runs."""
    with opened(work, max(SIZES)) as merge:
        engine = merge.engine
        loaded = ModelInMemory(engine, calibration.load(merge.asked().calibration, work / "base", engine.device))
        members = [Member(w.candidate) for w in merge.pool().values()]
        reading = merge.reading()
        reading.settle(merge.executor, silent)
        merged = MergedVector(reading.vector, reading.need, fixed=True)
        search = Search(SearchSpace(loaded, merged, NONE, members), merge.asked(), silent)
        search.put(search.start())
        loaded.backward()
        ratios = []
        for _ in range(5):
            began = time.process_time()
            loaded.scores(members, silent)
            scored = time.process_time() - began
            ratios.append((scored / (read := reads(members)), scored / len(members), read / len(members)))
        ratios.sort()
        ratio, score, read = ratios[len(ratios) // 2]
        print(
            f"scoring a candidate: {1e3 * score:.1f} ms CPU, reading its bytes once {1e3 * read:.1f} ms: "
            f"{ratio:.2f} times (median of 5)"
        )


def reads(members: list) -> float:
    """CPU seconds of reading the bytes of all candidates, once, in runs."""
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    began = time.process_time()
    for member in members:
        with open_model(Path(member.candidate.origin)) as model:
            for info in model.tensors.values():
                for start in range(0, info.nbytes, len(buffer)):
                    model.read_part(info, start, buffer[: min(len(buffer), info.nbytes - start)].numpy().data)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.2, help="size of the model in float32")
    parser.add_argument("--work", type=Path, help="an empty directory; default: a temporary one")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.work, args.worker)
        return
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        world(work, args.gigabytes)
        peaks = []
        for size in SIZES:
            command = [sys.executable, "-m", "tests.campaigns.bench.pool", "--work", str(work), "--worker", str(size)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            peaks.append(found["peak"])
            print(
                f"a round over {size:2}: VmHWM {found['peak'] / 1e6:.0f} MB, {found['folds']} folded, "
                f"{found['steps']} steps, {found['seconds']:.1f} s CPU",
                flush=True,
            )
        print(f"64 candidates against 4: {100 * (peaks[1] / peaks[0] - 1):+.1f} % of memory")
        (work / "state-64").rename(work / "used")
        scoring(work)


if __name__ == "__main__":
    main()
