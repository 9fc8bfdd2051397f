"""What one odd model does to a merge: fine-tunes of the suite *digits* and one model of another kind, merged together,
read by `spread` as it is and by the plain mean over the models.

    python -m tests.campaigns.bench.quality.odd --work W

Minutes. One line for each merge: ρ of the models by their records, and the mean test accuracy over the tasks of the
fine-tunes and the length of the matrices, by both laws.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from continual.making import Recipe
from continual.rules import read_options
from tests.campaigns.bench.quality import digits
from tests.campaigns.bench.quality.campaign import Campaign, settle_threads
from tests.campaigns.bench.quality.folding import Folding
from tests.campaigns.bench.quality.suite import FORMS, fine_tune, once

RULES = ("iso-c", "tsv-m", "gram", "opcm")
KINDS = ("none", "noise", "large", "long")
"""`noise`: in each tensor that the fine-tunes change normal numbers, as long as their mean there. `large`: a fine-tune,
five times as far from the base. `long`: a full fine-tune of another task with ten times as many steps."""
OTHER = "inverted"


def odd(suite: digits.Digits, kind: str, tasks: Sequence[str]) -> Path:
    """The directory of the odd model beside fine-tunes for `tasks`."""
    if kind == "long":
        longer = digits.Digits(suite.folder / "long", times=10)
        once(longer.folder / "base", lambda temporary: digits.save(_base(suite), temporary))
        return fine_tune(longer, OTHER, "full")
    target = suite.folder / "odd" / f"{kind}-{len(tasks)}"
    once(target, lambda temporary: digits.save(_made(suite, kind, tasks), temporary))
    return target


def _base(suite: digits.Digits) -> dict[str, Tensor]:
    return load_file(suite.prepare() / "model.safetensors")


def _made(suite: digits.Digits, kind: str, tasks: Sequence[str]) -> dict[str, Tensor]:
    base = _base(suite)
    tuned = [load_file(fine_tune(suite, task, "full") / "model.safetensors") for task in tasks]
    taus = [{name: one[name] - value for name, value in base.items()} for one in tuned]
    random = torch.Generator().manual_seed(0)
    made = {}
    for name, value in base.items():
        noise = torch.randn(value.shape, generator=random)
        long = fmean(float(tau[name].norm()) for tau in taus)
        made[name] = value + (5 * taus[0][name] if kind == "large" else noise * (long / float(noise.norm())))
    return made


def merged(campaign: Campaign, name: str, tasks: Sequence[str], other: Path | None) -> Iterator[str]:
    """Says how the fine-tunes and the odd model, where there is one, read together."""
    with Folding(campaign.states / "odd", campaign.suite.prepare(), Recipe(rule=name)) as folding:
        folding.begin((), 0)
        for task in tasks:
            folding.fold(fine_tune(campaign.suite, task, campaign.form))
        if other is not None:
            folding.fold(other)
        reading, unit = campaign.read(folding.merge())
        figures = reading.totals.each
        yield "rho " + " ".join(f"{m.spread_sum / m.matrix_norm_sum:.2f}" for m in figures)
        yield "norm " + " ".join(f"{m.matrix_norm_sum:.2f}/{m.plain_norm_sum:.2f}" for m in figures)
        for law, totals in (("mean", replace(reading.totals, each=())), ("held", reading.totals)):
            reading.totals = totals
            options = read_options(name)
            length = options.factors(totals, reading.size())[0] * (reading.size().parts or (0.0, 0.0))[0]
            right = campaign.ask(campaign.weights(reading, unit, options), tasks, "test")
            score = 100 * fmean(float(found.float().mean()) for found in right.values())
            yield f"{law}: {score:.1f} % length {length:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where fine-tunes and states are kept")
    parser.add_argument("--rule", choices=RULES, action="append", help="default: all")
    parser.add_argument("--form", choices=FORMS, action="append", help="default: full and lora")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8], help="how many models are merged")
    args = parser.parse_args()
    settle_threads(1)
    suite = digits.Digits(args.work / "digits")
    for form in args.form or FORMS:
        with Campaign(suite, form, args.work, Progress(disable=True)) as campaign:
            for count, kind in itertools.product(args.counts, KINDS):
                tasks = suite.tasks[: count if kind == "none" else count - 1]
                other = None if kind == "none" else odd(suite, kind, tasks)
                for name in args.rule or RULES:
                    said = merged(campaign, name, tasks, other)
                    print(f"{form}, {count} models, odd: {kind}, {name};", *said, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
