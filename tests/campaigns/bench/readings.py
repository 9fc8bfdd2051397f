"""What it takes to read a matrix, rule beside rule.

    python -m tests.campaigns.bench.readings
    python -m tests.campaigns.bench.readings --rule tsv-m --rule tsv-flow --shape 4096x1024 --models 8 20

For each shape and number of models: fine-tunes whose singular values fall as 1/k are folded once a state, and then
each rule reads what its state keeps, in turns, so that all see the same machine. CPU seconds of one thread, the median
of the rounds, behind it how many times those of the first rule, and the bytes of state a parameter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from continual.records import TensorSpec, Totals
from continual.rules import RULES, Inputs, Rule, readings, rule, settle
from continual.rules.contract import Accumulators

RULE_NAMES = ("tsv-m", "tsv-flow", "iso-c", "flow")
SHAPES = ((1024, 1024), (1536, 576), (4096, 1024))
Kept = tuple[Accumulators, Totals]


def fine_tune(m: int, n: int, seed: int) -> torch.Tensor:
    """An m×n task vector, float32."""
    random, k = torch.Generator().manual_seed(seed), min(m, n)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=random))[0] for side in (m, n))
    return (left / torch.arange(1, k + 1)) @ right.mT


def folded(one: Rule, spec: TensorSpec, models: int) -> Kept:
    """The accumulators of this tensor after so many fine-tunes, and the totals."""
    totals = Totals()
    kept: Accumulators = {
        name: torch.zeros(slot.shape, dtype=getattr(torch, slot.dtype)) for name, slot in one.slots(spec).items()
    }
    for seed in range(models):
        found = one.fold.apply(kept, fine_tune(*spec.shape, seed), Inputs(spec, 1.0, seed, None), totals)
        kept, totals = dict(found.accumulators), settle(totals, found.sums, 1.0)
    return kept, totals


def states(names: Sequence[str], spec: TensorSpec, models: int) -> dict[str, Kept]:
    """By rule what it reads: a rule that reads the state of an earlier one has that state."""
    found: dict[str, Kept] = {}
    for name in names:
        home = next((home for home in found if name in readings(RULES[home].rule())), None)
        found[name] = folded(rule(name), spec, models) if home is None else found[home]
    return found


def timed(names: Sequence[str], spec: TensorSpec, kept: dict[str, Kept], rounds: int) -> dict[str, float]:
    """CPU seconds of a reading by rule, the median of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            began = time.process_time()
            rule(name).read.unit(spec, *kept[name])
            seconds[name].append(time.process_time() - began)
    return {name: median(found) for name, found in seconds.items()}


def shape(text: str) -> tuple[int, int]:
    """`4096x1024`."""
    m, _, n = text.partition("x")
    return int(m), int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=list(RULES), action="append", help=f"default: {', '.join(RULE_NAMES)}")
    parser.add_argument("--shape", type=shape, action="append", metavar="ROWSxCOLUMNS", help="default: three of them")
    parser.add_argument("--models", type=int, nargs="+", default=[8], help="that are folded")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.rule or RULE_NAMES
    table = Table("shape", "models", *names, title="CPU seconds (times the first rule; bytes a parameter)")
    for m, n in args.shape or SHAPES:
        spec = TensorSpec("matrix", (m, n), "F32", "matrix")
        for models in args.models:
            kept = states(names, spec, models)
            found = timed(names, spec, kept, args.rounds)
            size = {name: sum(t.nbytes for t in one[0].values()) / (m * n) for name, one in kept.items()}
            cells = [f"{found[name]:.3f} ({found[name] / found[names[0]]:.2f}; {size[name]:.1f})" for name in names]
            table.add_row(f"{m}x{n}", str(models), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
