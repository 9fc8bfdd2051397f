"""What commands that only look cost: CPU seconds of `status`, `log`, `show`, `tag` and `pool` of a small state at rest.

    python -m tests.campaigns.bench.light [--against CHECKOUT] [--repeats 5]

Every command is a process of its own. With `--against` those of another checkout are run in turn with these, and ratios
are printed, this one's over the other's: medians, so that a machine that others use too says little.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import models

COMMANDS = (("status",), ("log",), ("show", "0"), ("tag",), ("pool",))


def spent(words: tuple[str, ...], state: Path, checkout: Path) -> float:
    """CPU seconds of a command of a checkout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "continual", *words, "--state", str(state)],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    here = Path(__file__).parents[3]
    checkouts = [here, *([] if args.against is None else [args.against.absolute()])]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base, state = models.base(work / "base"), work / "state"
        spent(("init", str(base)), state, here)
        spent(("fold", str(models.fine_tune(base, work / "alice", 1))), state, here)
        for words in COMMANDS:
            turns = [[spent(words, state, checkout) for checkout in checkouts] for _ in range(args.repeats + 1)][1:]
            medians = [statistics.median(column) for column in zip(*turns, strict=True)]
            ratio = "" if len(medians) == 1 else f", {medians[0] / medians[1]:.2f} of {medians[1]:.2f}"
            print(f"{' '.join(words)}: {medians[0]:.2f} CPU s{ratio}", flush=True)


if __name__ == "__main__":
    main()
