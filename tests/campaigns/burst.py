"""Many models published at once beside readers that export all the time, with one generation kept: whether each is
folded, exactly once, and whether anybody was alarmed without a reason.

    python -m tests.campaigns.burst --models 300 --readers 5

Renames as many model directories into the watched folder at one moment. Each reader is a process that opens the state,
exports it and opens it again. The daemon is asked for its health four times a second. Counted as false alarms: a health
that is not `ok`, a log line above `info`, an alert counter that moved, an export that failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import continual
from continual import making
from continual.state import State
from continual.state.verify import verify
from tests.helpers import models
from tests.helpers.services import daemon, get, status, url

ALARMS = ("continual_errors_total", "continual_retries_total", "continual_refusals_total", "continual_degraded")


def read(state: Path, out: Path, stop: Path) -> None:
    """A reader: exports until `stop` is there, and prints how often, and every failure in a line."""
    done, failed = 0, []
    while not stop.exists() and stop.parent.exists():  # where the campaign failed, its directory is gone
        try:
            with continual.open(state) as merge:
                merge.export(out)
            done += 1
            out.with_suffix(".begun").touch()
        except continual.ContinualError as error:
            failed.append(f"{type(error).__name__}: {error}")
        shutil.rmtree(out, ignore_errors=True)
    print(json.dumps({"exports": done, "failed": failed}))


def moved(metrics: str) -> list[str]:
    """The alert series that are not 0."""
    return [line for line in metrics.splitlines() if line.startswith(ALARMS) and float(line.split()[-1]) != 0.0]


def watched(process: subprocess.Popen[str], state: Path, count: int, limit: float) -> tuple[float, set[str]]:
    """Waits until `count` are folded. Returns the seconds that took, and what health said besides ok."""
    address, begun, alarms = url(process, state), time.monotonic(), set()
    while time.monotonic() - begun < limit:
        body = status(address)
        if body["health"] != "ok":
            alarms.add(f"{body['health']}: {body['why']}")
        if body["folds"] >= count:
            alarms.update(moved(get(f"{address}/metrics")[1]))
            return time.monotonic() - begun, alarms
        time.sleep(0.25)
    raise SystemExit(f"not folded within {limit:.0f} s: {json.dumps(body)[:2000]}")


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--readers", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for all of it")
    parser.add_argument("--read", nargs=3, type=Path, metavar=("STATE", "OUT", "STOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(*args.read)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base, watch, state, stop = models.base(work / "base"), work / "in", work / "state", work / "stop"
        watch.mkdir()
        making.init(base, state)
        models.fine_tune(base, watch / "first", 1)
        staged = [models.fine_tune(base, work / f"staged/m{number:04}", 2 + number) for number in range(args.models)]
        with daemon(state, watch, "--keep", "1", "--log-json") as process:
            watched(process, state, 1, args.limit)
            command = [sys.executable, "-m", "tests.campaigns.burst", "--read", str(state)]
            readers = [
                subprocess.Popen([*command, str(work / f"out{k}"), str(stop)], stdout=subprocess.PIPE, text=True)
                for k in range(args.readers)
            ]
            end = time.monotonic() + args.limit
            while len(list(work.glob("*.begun"))) < args.readers and time.monotonic() < end:
                time.sleep(0.25)
            for path in staged:
                path.rename(watch / path.name)
            seconds, alarms = watched(process, state, 1 + args.models, args.limit)
            stop.touch()
            told = [json.loads(reader.communicate()[0]) for reader in readers]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        lines = [json.loads(line) for line in (work / "daemon.log").read_text().splitlines()]
        with State.open(state) as opened:
            names = [fold.entry.candidate.name for fold in opened.ledger.folds()]
            damage = [str(finding) for finding in verify(opened)]
    found = {
        "models": args.models,
        "folded": len(names),
        "exactly_once": len(names) == len(set(names)),
        "seconds": round(seconds, 1),
        "exports": sum(reader["exports"] for reader in told),
        "failed_exports": [line for reader in told for line in reader["failed"]],
        "alarms": sorted(alarms),
        "log_above_info": [line for line in lines if line["level"] != "info"],
        "damage": damage,
    }
    print(json.dumps(found, indent=1))
    quiet = not (found["failed_exports"] or alarms or found["log_above_info"] or damage)
    raise SystemExit(0 if quiet and found["folded"] == args.models + 1 and found["exactly_once"] else 1)


if __name__ == "__main__":
    main()
