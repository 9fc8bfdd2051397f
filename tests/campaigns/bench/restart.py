"""How long a daemon takes to come back, by how many records its ledger has.

`python -m tests.campaigns.bench.restart` makes states as `tests.campaigns.bench.ledger` does (three of four records
are folds with sketches of their own), starts `continual run` on each, waits until `/readyz` is good, kills it
(SIGKILL), and starts it again: wall seconds from the start of the process, and CPU seconds until then, which other work
on the machine disturbs less; the least of `--times`, and the peak memory of the process. The two sizes take turns.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import continual
from tests.campaigns.bench.ledger import grown
from tests.campaigns.many_folders import spent
from tests.helpers import models
from tests.helpers.services import get, until, url


def started(state: Path, watch: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds until a daemon is ready, and its MiB; then it is killed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "continual", "run", "--state", str(state), "--watch", str(watch), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            ready = f"{url(process, state)}/readyz"
            until(lambda: get(ready)[0] == 200, "it is ready")
            wall, cpu = time.perf_counter() - began, spent(process.pid)
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            memory = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
        finally:
            os.kill(process.pid, signal.SIGKILL)
    return wall, cpu, memory


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=(10, 10_000))
    parser.add_argument("--times", type=int, default=3)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base, watch = models.base(folder / "base"), folder / "in"
        watch.mkdir()
        model = models.fine_tune(base, folder / "fine-tune", seed=1)
        first = {}
        for records in wanted.sizes:
            state = folder / f"state-{records}"
            continual.init(base, state, continual.Recipe(rule="iso-c"))
            with continual.open(state, write=True) as merge:
                merge.fold(model)
            grown(state, records)
            first[records] = started(state, watch)
        again: dict[int, list[tuple[float, float, float]]] = {records: [] for records in wanted.sizes}
        for _ in range(wanted.times):
            for records, found in again.items():
                found.append(started(folder / f"state-{records}", watch))
        print("| records | first, wall s | CPU s | after a kill, wall s | CPU s | memory |\n|---|---|---|---|---|---|")
        for records, found in again.items():
            wall, cpu, memory = (min(column) for column in zip(*found, strict=True))
            once = f"{first[records][0]:.2f} | {first[records][1]:.2f}"
            print(f"| {records:,} | {once} | {wall:.2f} | {cpu:.2f} | {memory:.0f} MiB |")


if __name__ == "__main__":
    main()
