"""What `continual plan --time` said, against the folds and exports that came then.

    python -m tests.campaigns.bench.forecast [--gigabytes 0.1 0.5] [--layers 3] [--rules task-arithmetic ties iso-c]
        [--repeats 3] [--workers 1] [--sides 4096]

A bf16 model with its fine-tunes; with `--sides` also one of a single square matrix of each of these sides, which shows
what becomes of a law beyond the sample. For each rule, in a process of its own each: `plan --init` of the base of which
only the header is there, `init`, a first fold; then in turns `plan --time`, a fold and an export. Printed are ratios of
what was taken to what was said, medians over the turns: CPU and wall seconds, VmHWM and disk, of the whole command.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.campaigns.bench.ran import THREADS, Cost, continual
from tests.helpers import models

RULES = ("task-arithmetic", "ties", "iso-c", "tsv-m", "opcm")


def said(*words: object) -> Any:
    """What `continual` answers to these words."""
    command = [sys.executable, "-m", "continual", *map(str, words), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **THREADS})
    return json.loads(done.stdout)


def on_disk(directory: Path) -> int:
    """Bytes that a directory takes on the disk."""
    return sum(512 * path.lstat().st_blocks for path in directory.rglob("*") if path.is_file())


def header_of(base: Path, directory: Path) -> Path:
    """A copy of a base that ends behind the header of its weights."""
    directory.mkdir()
    shutil.copyfile(base / "config.json", directory / "config.json")
    with (base / "model.safetensors").open("rb") as file:
        length = file.read(8)
        (directory / "model.safetensors").write_bytes(length + file.read(int.from_bytes(length, "little")))
    return directory


def ratios(taken: Cost, disk: int, forecast: Mapping[str, Any]) -> dict[str, float]:
    """What was taken over what was said."""
    return {
        "CPU": taken.whole / forecast["cpu_seconds"],
        "wall": taken.wall / forecast["seconds"],
        "memory": taken.memory / forecast["memory_bytes"],
        "disk": disk / forecast["disk_bytes"],
    }


def turns(rule: str, base: Path, tunes: list[Path], work: Path, workers: int) -> dict[str, list[dict[str, float]]]:
    """The ratios of every turn, by what was done."""
    state, export = work / "state", work / "export"
    on = ("--state", str(state), "--workers", str(workers))
    gates = ("--gate", "noise.act=off")  # what is folded here is noise
    before = said("plan", "--init", header_of(base, work / "header"), "--rule", rule, *on)
    continual("init", str(base), "--rule", rule, "--state", str(state))
    continual("fold", str(tunes[0]), *on, *gates, "--keep", "1")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("fold", "export", "fold (init)", "export (init)")}
    for tune in tunes[1:]:
        (now,) = said("plan", tune, "--time", *on, *gates)
        fold = continual("fold", str(tune), *on, *gates, "--keep", "1")
        wrote = on_disk(state / "generations")
        exported = continual("export", str(export), *on)
        out = on_disk(export)
        shutil.rmtree(export)
        for suffix, outlook in (("", now["time"]), (" (init)", before)):
            found["fold" + suffix].append(ratios(fold, wrote, outlook["fold"]))
            # the scratch file of an export has no name, and cannot be seen afterwards
            scratch = outlook["export"]["disk_bytes"] - sum(path.stat().st_size for path in base.glob("*.safetensors"))
            found["export" + suffix].append(ratios(exported, out + max(0, scratch), outlook["export"]))
    shutil.rmtree(state)
    shutil.rmtree(work / "header")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[0.1, 0.5])
    parser.add_argument("--sides", type=int, nargs="*", default=[])
    parser.add_argument("--layers", type=int, default=3, help="fewer layers of a model of one size are wider")
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to work")
    args = parser.parse_args()
    sized = [models.big_shapes(gigabytes, layers=args.layers) for gigabytes in args.gigabytes]
    sized += [{"model.norm.weight": (side,), "model.layers.0.mlp.up_proj.weight": (side, side)} for side in args.sides]
    for shapes in sized:
        with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
            work = Path(temporary)
            base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
            tunes = [models.fine_tune(base, work / f"fine-tune-{n}", n) for n in range(1 + args.repeats)]
            size = (base / "model.safetensors").stat().st_size / 1e9
            side = shapes["model.norm.weight"][0]
            print(f"model of {size:.2f} GB, sides from {side} on; taken over said, medians of {args.repeats}")
            for rule in args.rules:
                for what, rows in turns(rule, base, tunes, work, args.workers).items():
                    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                    print(f"  {rule}, {what}: " + ", ".join(f"{key} {value:.2f}" for key, value in medians.items()))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
