"""What the gates add to the CPU time of a fold, but for an evaluation: sketches, directions that stand out, how a model
lies to the merge, and the verdicts.

    python -m tests.campaigns.bench.gates [--gigabytes 0.3] [--layers 24] [--rules task-arithmetic ties tsv-m]
        [--models 3] [--repeats 5]

A bf16 model with its fine-tunes. Each turn is a process of its own with one thread that folds as many models, and
measures the last; every other turn is without what the gates look at (nothing is watched while tensors stream by, and
no gate is asked after the headers), so that the two stand side by side. CPU seconds are medians, the ratio that of the
medians of all pairs.
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

class Nothing:
    def __init__(self, spec, plan): pass
    def add(self, start, part): pass
    def wanted(self, start): return 0
    def picture(self): return None

how, rule, base, state, *tunes = sys.argv[1:]
if how == "bare":
    folding.Watched = Nothing
    Gates.at_tensor = lambda self, seen: None
    Gates.at_numbers = lambda self, seen: ()
making.init(Path(base), Path(state), making.Recipe(rule=rule))
with api.Merge(Settings(state=state, workers=1, keep=1, gates=["noise.act=warn"]), write=True) as merge:
    merge.engine
    for model in tunes:
        began = time.process_time()
        outcome = merge.fold(Path(model))
        spent = time.process_time() - began
        assert outcome.fate == "folded", outcome.message
    numbers = merge.state.ledger.folds()[-1].entry.numbers
    assert (how == "bare") == (not any(numbers.sketch.norms)), "what is left out is left out"
shutil.rmtree(state)
print(json.dumps(spent))
"""


def turn(how: str, rule: str, base: Path, state: Path, tunes: list[Path]) -> float:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, how, rule, str(base), str(state), *map(str, tunes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(json.loads(done.stdout))


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
            pairs = []
            for number in range(args.repeats):
                order = ("gates", "bare") if number % 2 else ("bare", "gates")
                found = {how: turn(how, rule, base, work / "state", tunes) for how in order}
                pairs.append((found["gates"], found["bare"]))
            with_gates, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(one / other for one, other in pairs)
            print(f"{rule}: {with_gates:.2f} CPU s with the gates, {bare:.2f} without: {ratio - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
