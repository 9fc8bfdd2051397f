"""Peak memory of folds, each in a process of its own.

    python -m tests.campaigns.bench.memory [--folds 100] [--gigabytes 1.0]

First `--folds` folds of a small model in one process: VmHWM after the 2nd and after the last, and the state's bytes.
Then one process per rule that folds two fine-tunes of a bf16 model of `--gigabytes` (at least 300 tensors, none over 64
MB): VmHWM with torch imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.helpers import models


def peak() -> int:
    """VmHWM of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(rule: str, base: str, state: str, fine_tunes: list[str]) -> None:
    """Folds the models in order and prints peak and state bytes after each as one JSON list."""
    from continual import api, making
    from continual.config import Settings

    making.init(base, state, making.Recipe(rule=rule))
    seen = []
    with api.Merge(Settings(state=Path(state)), write=True) as merge:
        for model in fine_tunes:
            outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
            seen.append((peak(), merge.state.generation_bytes()))
    json.dump(seen, sys.stdout)


def measure(rule: str, base: Path, work: Path, fine_tunes: list[Path]) -> list[tuple[int, int]]:
    """(peak, state bytes) after each fold, from a fresh process."""
    code = (
        f"from tests.campaigns.bench.memory import child; child({rule!r}, {str(base)!r}, "
        f"{str(work / f'state-{rule}')!r}, {[str(f) for f in fine_tunes]!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [tuple(pair) for pair in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=100)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shapes = {name: tuple(8 * n if n > 1 else n for n in shape) for name, shape in models.SHAPES.items()}
        base = models.base(work / "base", shapes=shapes)
        fine_tunes = [models.fine_tune(base, work / f"ft-{i:03d}", i) for i in range(args.folds)]
        for rule in ("mean", "opcm", "iso-c"):
            seen = measure(rule, base, work, fine_tunes)
            (second, size), (last, last_size) = seen[1], seen[-1]
            print(
                f"{rule}: VmHWM after fold 2 {second / 1e6:.1f} MB, after fold {len(seen)} "
                f"{last / 1e6:.1f} MB ({last / second - 1:+.2%}); state {size} and {last_size} bytes"
            )
        big = models.base(work / "big", shapes=models.big_shapes(args.gigabytes, layers=36), dtype=torch.bfloat16)
        tunes = [models.fine_tune(big, work / f"big-{i}", i) for i in range(2)]
        sizes = [torch.Size(s).numel() * 2 for s in models.big_shapes(args.gigabytes, layers=36).values()]
        print(f"model: {sum(sizes) / 1e9:.2f} GB bf16, {len(sizes)} tensors, largest {max(sizes) / 1e6:.0f} MB")
        for rule in ("mean", "opcm", "iso-c"):
            seen = measure(rule, big, work / "big", tunes)
            print(
                f"{rule}: VmHWM {seen[0][0] / 1e6:.0f} MB at fold 1, {seen[-1][0] / 1e6:.0f} MB at fold "
                f"2; state {seen[-1][1] / 1e9:.2f} GB"
            )


if __name__ == "__main__":
    main()
