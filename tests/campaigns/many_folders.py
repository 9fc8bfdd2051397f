"""A daemon beside many settled models: how long a restart takes until the first new one is folded, how soon a burst of
new ones is seen, and what it costs to do nothing.

    python -m tests.campaigns.many_folders --folders 10000

Makes as many tiny model directories (reflinks of each other where the file system knows them), settles them as refused,
publishes one more, and starts `continual run`. Times count from the start of the process, imports of torch included;
beside them stands the processor time until then, which other work on the machine disturbs less. Idle is what
/proc/PID/stat says over `--idle` seconds after the last fold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from continual import api, making
from continual.state.entries import RefuseEntry
from continual.tensors import candidate_of, open_model
from tests.helpers import models
from tests.helpers.services import status, url

TICKS = os.sysconf("SC_CLK_TCK")


def spent(pid: int) -> float:
    """Seconds of a processor that a process took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def settle(base: Path, state: Path, watch: Path, folders: int) -> None:
    """Makes model directories, and a record of each that it was refused."""
    data, config = (base / "model.safetensors").read_bytes(), (base / "config.json").read_bytes()
    with api.open(state, write=True) as merge, mock.patch("os.fsync", return_value=None):
        for number in range(folders):
            path = watch / f"old-{number:05}"
            path.mkdir()
            (path / "model.safetensors").write_bytes(data)
            (path / "config.json").write_bytes(config)
            with open_model(path, root=watch) as model:
                candidate = candidate_of(model, source="folder")
            merge.record(RefuseEntry(candidate=candidate, reason="zero", message=f"{path.name}: equals the base"))


def until_folded(process: subprocess.Popen[bytes], log: Path, count: int, seconds: float) -> float:
    """Waits until the daemon has said so often that it folded something. Returns when, on the monotonic clock."""
    end = time.monotonic() + seconds
    while log.read_text().count('"event": "folded"') < count:
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"not folded:\n{log.read_text()[-2000:]}")
        time.sleep(0.01)
    return time.monotonic()


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=10_000)
    parser.add_argument("--burst", type=int, default=20, help="models published at once beside them")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds for which nothing happens")
    parser.add_argument("--settle", type=float, default=0.2, help="the daemon's setting")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base, watch, log = models.base(work / "base"), work / "in", work / "daemon.log"
        watch.mkdir()
        making.init(base, work / "state", making.Recipe(rule="mean"))
        settle(base, work / "state", watch, args.folders)
        models.fine_tune(base, watch / "new", 1)
        command = ["run", "--state", work / "state", "--watch", watch, "--port", "0", "--settle", args.settle]
        with open(log, "wb") as stderr:
            begun = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "continual", *map(str, command), "--log-json"], stderr=stderr
            )
        try:
            first = until_folded(process, log, 1, 600.0) - begun
            cpu = spent(process.pid)
            address = url(process, work / "state")  # type: ignore[arg-type]
            staged = [models.fine_tune(base, watch / f".burst-{number}", 10 + number) for number in range(args.burst)]
            begun = time.monotonic()
            for path in staged:
                path.rename(path.with_name(path.name[1:]))
            burst = until_folded(process, log, 1 + args.burst, 600.0) - begun
            time.sleep(args.settle + 2.0)
            before, begun = spent(process.pid), time.monotonic()
            time.sleep(args.idle)
            idle = (spent(process.pid) - before) / (time.monotonic() - begun)
            body = status(address)
            peak = next(
                line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line
            )
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    found = {
        "folders": args.folders,
        "first_fold_s": round(first, 2),
        "first_fold_cpu_s": round(cpu, 2),
        "burst": args.burst,
        "burst_folded_s": round(burst, 2),
        "idle_percent_of_a_core": round(100 * idle, 3),
        "records": body["head"] + 1,
        "queued": body["queued"],
        "notes": body["notes"],
        "peak_mb": int(peak.split()[1]) // 1024,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
