"""Folds the model directories named on standard input into a state, one a line; answers each with a line of JSON: what
the fold took.

A process of its own, so that its peak memory (VmHWM, set back before each fold) and its CPU seconds are those of
folding.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import continual


def peak() -> float:
    """VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    with continual.open(sys.argv[1], write=True, keep=1, workers=1) as merge:
        for line in sys.stdin:
            Path("/proc/self/clear_refs").write_text("5")
            began = cpu()
            outcome = merge.fold(line.strip())
            if outcome.fate != "folded":
                raise SystemExit(outcome.line())
            print(
                json.dumps({"cpu": cpu() - began, "peak": peak(), "state": merge.state.generation_bytes()}), flush=True
            )


if __name__ == "__main__":
    main()
