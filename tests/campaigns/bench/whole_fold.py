"""What the fold of a whole fine-tune costs in a state of whole tensors, against what the same bytes cost, and what an
export does.

    python -m tests.campaigns.bench.whole_fold [--gigabytes 0.5] [--rules task-arithmetic iso-c ties] [--layers 24]
        [--against CHECKOUT] [--repeats 5] [--sides 1024 4864] [--embedding ROWS COLUMNS] [--folds]

A bf16 model with its fine-tunes. Each turn is a process of its own with one thread: it makes a state (`init`), folds
two fine-tunes, exports the merge, and reads, hashes and writes what the second fold did, no more (`floor`): base,
fine-tune and state are read in pieces of 1 MiB, the fine-tune goes through BLAKE3, the state through CRC-32C as it is
read and as it is written, and the files are synced. All are CPU seconds per GB of the model, beyond imports, those of
the kernel in brackets: medians of all turns. Memory is what came beyond what was held. `--sides` says what the layers
are made of, in place of `--gigabytes`. With `--embedding` the model has one of that shape; `--folds` leaves exports
out. `--against` names a checkout of another version of continual, which takes turns with this one.
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
import json, os, resource, shutil, sys, time
from pathlib import Path
import google_crc32c, numpy, torch
from blake3 import blake3
from continual import api, making
from continual.config import Settings

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def kernel():
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime

def clear():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def through(paths, see):
    buffer = numpy.empty(1 << 20, numpy.uint8)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                see(buffer[:count])

def floor(base, model, arrays, scratch):
    through([base], lambda part: None)
    whole = blake3()
    through([model], whole.update)
    through(arrays, lambda part: google_crc32c.extend(0, part))
    buffer = numpy.ones(1 << 20, numpy.uint8)
    scratch.mkdir()
    for number, path in enumerate(arrays):
        left = path.stat().st_size
        with open(scratch / str(number), "wb", buffering=0) as file:
            while left:
                part = buffer[:left]
                google_crc32c.extend(0, part)
                left -= file.write(part)
            os.fsync(file.fileno())

rule, exports, base, state, *tunes = sys.argv[1:]
state = Path(state)
found = {"held": peak()}
began = time.process_time()
making.init(Path(base), state, making.Recipe(rule=rule))
found["init"] = time.process_time() - began
for number, model in enumerate(tunes, 1):
    with api.Merge(Settings(state=state, workers=1, keep=1), write=True) as merge:
        merge.engine
        clear()
        held, began, inside = peak(), time.process_time(), kernel()
        outcome = merge.fold(Path(model))
        found[f"fold {number}"] = time.process_time() - began
        found[f"fold {number} kernel"] = kernel() - inside
        found["memory"] = max(found.get("memory", 0), peak() - held)
        assert outcome.fate == "folded", outcome.message
if exports == "True":
    with api.Merge(Settings(state=state, workers=1), write=True) as merge:
        merge.engine
        clear()
        held, began = peak(), time.process_time()
        merge.export(state / "export")
        found["export"] = time.process_time() - began
        found["export memory"] = peak() - held
    shutil.rmtree(state / "export")
arrays = [path for path in (state / "generations").rglob("*") if path.is_file() and path.name.startswith("c")]
file = "model.safetensors"
began, inside = time.process_time(), kernel()
floor(Path(base) / file, Path(tunes[-1]) / file, arrays, state / "floor")
found["floor"] = time.process_time() - began
found["floor kernel"] = kernel() - inside
shutil.rmtree(state)
print(json.dumps(found))
"""


def turn(checkout: Path, rule: str, exports: bool, base: Path, state: Path, tunes: list[Path]) -> dict[str, float]:
    """The figures of one turn, by the code of `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, rule, str(exports), str(base), str(state), *map(str, tunes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=24, help="fewer layers of a model of one size are wider")
    parser.add_argument("--sides", type=int, nargs=2, metavar=("HIDDEN", "INNER"))
    parser.add_argument("--embedding", type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--folds", action="store_true", help="no exports")
    parser.add_argument("--rules", nargs="+", default=["task-arithmetic", "iso-c", "ties"])
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    versions = {"this version": HERE} | ({"the other": args.against.absolute()} if args.against else {})
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shapes = models.big_shapes(args.gigabytes, layers=args.layers, sides=args.sides)
        if args.embedding:
            shapes["model.embed_tokens.weight"] = tuple(args.embedding)
        base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
        tunes = [models.fine_tune(base, work / f"fine-tune-{number}", number) for number in range(2)]
        size = (base / "model.safetensors").stat().st_size / 1e9
        print(f"model of {size:.2f} GB; CPU seconds per GB, beyond imports; medians of {args.repeats}")
        for rule in args.rules:
            turns: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
            for _ in range(args.repeats):
                for version, checkout in versions.items():
                    turns[version].append(turn(checkout, rule, not args.folds, base, work / "state", tunes))
            for version, figures in turns.items():
                median = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
                memory, exporting = median.pop("memory") / 1e6, median.pop("export memory", 0.0) / 1e6
                del median["held"]
                kernel = {key: median.pop(f"{key} kernel") / size for key in ("fold 1", "fold 2", "floor")}
                said = ", ".join(
                    f"{key} {value / size:.2f}" + (f" ({kernel[key]:.2f})" if key in kernel else "")
                    for key, value in median.items()
                )
                ratio = statistics.median(each["fold 2"] / each["floor"] for each in figures)
                print(
                    f"  {rule}, {version}: {said}; fold 2 / floor {ratio:.2f}; memory of a fold {memory:.0f} MB"
                    + (f", of an export {exporting:.0f} MB" if exporting else "")
                )


if __name__ == "__main__":
    main()
