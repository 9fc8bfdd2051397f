"""What the gates add to the CPU time of a fold, but for an evaluation: sketches, directions that stand out, grids, how
a model lies to the merge, and the verdicts.

    python -m tests.campaigns.bench.gates [--gigabytes 0.3] [--layers 24] [--rules task-arithmetic ties tsv-m]
        [--models 3] [--repeats 5]

A bf16 model with its fine-tunes. A process with one thread folds all but the last; the last is folded, rolled back and
folded again, by turns with the gates and without what they look at (nothing is watched while tensors stream by, and no
gate is asked after the headers), so that the two stand side by side. CPU seconds are medians, the ratio that of the
medians, and in brackets the least and the largest of the pairs. Where other processes are at work these lie far apart:
so what the gates take is also counted within the fold itself, as the CPU time of the calls that are left out else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.helpers import models

HERE = Path(__file__).parents[3]
WORKER = """
import json, shutil, sys, time
from pathlib import Path
from continual import api, making
from continual.config import Settings
from continual.engine import folding
from continual.gates import Gates
from continual.tensors.vectors import vectors

class Nothing:
    def __init__(self, spec, plan): pass
    def add(self, start, part): pass
    def wanted(self, start): return 0
    def picture(self, grid): return None

counted = [0.0]

def clocked(call):
    def timed(*args, **more):
        began = time.thread_time()
        try:
            return call(*args, **more)
        finally:
            counted[0] += time.thread_time() - began
    return timed

class Watched(folding.Watched):
    __init__, add, beside, picture = map(clocked, (
        folding.Watched.__init__, folding.Watched.add, folding.Watched.beside, folding.Watched.picture
    ))

folding.first_of = clocked(folding.first_of)
kept = Watched, clocked(Gates.at_tensor), clocked(Gates.at_numbers), clocked(vectors._grid_of)

def choose(bare):
    folding.Watched = Nothing if bare else kept[0]
    Gates.at_tensor = (lambda self, seen: None) if bare else kept[1]
    Gates.at_numbers = (lambda self, seen: ()) if bare else kept[2]
    vectors._grid_of = (lambda values, base, shape: None) if bare else kept[3]

repeats, rule, base, state, *tunes = sys.argv[1:]
making.init(Path(base), Path(state), making.Recipe(rule=rule))
found = []
with api.Merge(Settings(state=state, workers=1, keep=2, gates=["noise.act=warn"]), write=True) as merge:
    def fold(model):
        began = time.process_time()
        outcome = merge.fold(Path(model))
        spent = time.process_time() - began
        assert outcome.fate == "folded", outcome.message
        return spent

    for model in tunes:
        fold(model)
    back = merge.state.ledger.folds()[-2].seq
    for number in range(int(repeats)):
        pair = {}
        for bare in ((True, False) if number % 2 else (False, True)):
            merge.state.rollback(back)
            merge.retry(tunes[-1])
            choose(bare)
            counted[0] = 0.0
            pair["bare" if bare else "gates"] = fold(tunes[-1])
            if not bare:
                pair["share"] = counted[0] / pair["gates"]
            choose(False)
            numbers = merge.state.ledger.folds()[-1].entry.numbers
            assert bare == (not any(numbers.sketch.norms)), "what is left out is left out"
            merge.expire()
        found.append((pair["gates"], pair["bare"], pair["share"]))
shutil.rmtree(state)
print(json.dumps(found))
"""


def pairs_of(rule: str, repeats: int, base: Path, state: Path, tunes: list[Path]) -> list[list[float]]:
    """CPU seconds of the last fold with the gates and without, by pairs, and the share of the gates in the first."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(repeats), rule, str(base), str(state), *map(str, tunes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: list[list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--layers", type=int, default=24, help="fewer layers of a model of one size are wider")
    parser.add_argument("--rules", nargs="+", default=["task-arithmetic", "ties", "tsv-m"])
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shapes = models.big_shapes(args.gigabytes, layers=args.layers)
        base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
        tunes = [models.fine_tune(base, work / f"fine-tune-{number}", number) for number in range(args.models)]
        size = (base / "model.safetensors").stat().st_size / 1e9
        print(f"model of {size:.2f} GB, fold of the last of {args.models}; medians of {args.repeats} pairs")
        for rule in args.rules:
            pairs = pairs_of(rule, args.repeats, base, work / "state", tunes)
            with_gates, bare, within = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = [one / other - 1 for one, other, _ in pairs]
            told = f"{with_gates:.2f} CPU s with the gates, {bare:.2f} without: {with_gates / bare - 1:+.1%}"
            print(f"{rule}: {told} ({min(ratios):+.1%} to {max(ratios):+.1%}); counted {within:.1%}", flush=True)


if __name__ == "__main__":
    main()
