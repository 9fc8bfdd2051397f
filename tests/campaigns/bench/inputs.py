"""`regmean` of adapters, measured: the inputs that layers have on a few rows of each task are read once, and the merge
is read by them, against readings that need no rows. Accuracy on test rows, which nothing sees before; of the
differences 95 % intervals over rows, the same rows in every order and task.

    python -m tests.campaigns.bench.inputs --work W --suite digits --tasks 4 8
    python -m tests.campaigns.bench.inputs --work W --data DIR --data SETS --suite language --tasks 4

W, DIR and SETS are those of `tests.campaigns.bench.quality`, whose adapters are taken where they are there, and trained
where not. The rows are held out of training, and are no test rows. Under a minute for digits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import continual
from continual.making import WIDTH
from tests.campaigns.bench import layers
from tests.campaigns.bench.quality.campaign import settle_threads
from tests.campaigns.bench.quality.suite import Watching, fine_tune

RULES = ("tsv-m", "tsv-w", "gram", "flow", "iso-c", "regmean")


def measured(place: layers.Place, work: Path, rank: int, rules: tuple[str, ...]) -> dict[str, Any]:
    """Folds the adapters, reads the inputs, and asks the merge by each rule: what was right, row by row."""
    importlib.import_module(layers.MODULE).PLACE["now"] = place
    base, state = place.suite.prepare(), work / "inputs-state"
    shutil.rmtree(state, ignore_errors=True)
    continual.init(base, state, continual.Recipe(width=WIDTH))
    told: dict[str, Any] = {"tasks": len(place.wanted), "right": {}, "watched": {}}
    with continual.open(state, write=True, workers=1, max_base_ratio=100.0) as merge:
        for task in place.wanted:
            merge.fold(fine_tune(place.suite, task, "lora"))
        begun = time.process_time()
        found = merge.read_inputs(replace(place.inputs(list(place.wanted)), rank=rank))
        told["seconds"] = time.process_time() - begun
        told["bytes a task"] = found.tasks[0][3]
        told["bytes of the adapters"] = merge.state.generation_bytes()
        for name in rules:
            target = work / "inputs-export"
            shutil.rmtree(target, ignore_errors=True)
            merge.export(continual.Target(target, dtype="F32"), view=continual.ReadView(rule=name))
            weights = load_file(target / "model.safetensors")
            shutil.rmtree(target)
            told["right"][name] = [place.suite.correct(weights, task, "test").float() for task in place.wanted]
            if isinstance(place.suite, Watching):
                told["watched"][name] = place.suite.watch(weights, place.wanted)
    shutil.rmtree(state)
    return told


def interval(runs: list[dict[str, Any]], one: str, other: str, draws: int = 2000) -> str:
    """The mean difference of two rules over runs and tasks, and its interval over rows."""
    random, found = torch.Generator().manual_seed(0), []
    pairs = [(a, b) for run in runs for a, b in zip(run["right"][one], run["right"][other], strict=True)]
    for _ in range(draws):
        drawn = {n: torch.randint(n, (n,), generator=random) for n in sorted({len(a) for a, _ in pairs})}
        found.append(100 * sum(float((a - b)[drawn[len(a)]].mean()) for a, b in pairs) / len(pairs))
    found.sort()
    mean = 100 * sum(float((a - b).mean()) for a, b in pairs) / len(pairs)
    return f"{mean:+.1f} [{found[draws // 40]:+.1f}, {found[-draws // 40]:+.1f}]"


def accuracy(runs: list[dict[str, Any]], name: str) -> float:
    """Mean over runs and tasks, in per cent."""
    found = [float(right.mean()) for run in runs for right in run["right"][name]]
    return 100 * sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where fine-tunes and states are kept")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder with text/; repeatable")
    parser.add_argument("--suite", choices=("digits", "language"), required=True)
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 8], help="numbers of models that are merged")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 100], help="rows a task, at most 100")
    parser.add_argument("--rank", type=int, default=64, help="eigenvalues that are kept of a layer")
    parser.add_argument("--seeds", type=int, default=3, help="draws of tasks and rows")
    parser.add_argument("--rule", action="append", help="rules that read; by default six")
    asked = parser.parse_args()
    settle_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    rules = tuple(asked.rule or RULES)
    for count in asked.tasks:
        for rows in asked.rows:
            runs = []
            for seed in range(asked.seeds):
                place: layers.Place
                if asked.suite == "digits":
                    place = layers.OnDigits(asked.work, count, rows, seed)
                else:
                    place = layers.OnLanguage(asked.work, asked.data, count, rows, seed)
                runs.append(measured(place, asked.work, asked.rank, rules))
            told: dict[str, Any] = {name: round(accuracy(runs, name), 1) for name in rules}
            if "regmean" in rules:
                told["less"] = {name: interval(runs, "regmean", name) for name in rules if name != "regmean"}
            told["watched"] = [run["watched"] for run in runs if run["watched"]]
            figures = {key: runs[-1][key] for key in ("seconds", "bytes a task", "bytes of the adapters")}
            print(json.dumps({"tasks": count, "rows": rows, **told, **figures}), flush=True)


if __name__ == "__main__":
    main()
