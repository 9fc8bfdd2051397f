"""From a webhook to a commit."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from continual import making
from tests.helpers import models
from tests.helpers.hubs import publish
from tests.helpers.services import daemon, until, url
from tests.loopback import Hub, environment
from tests.loopback.webhooks import post


def webhook(work: Path, hub: Hub, args: argparse.Namespace) -> None:
    """A real daemon that polls once an hour is told of a new repo: until its commit is on disk, less the fold's own
    seconds."""
    work = work / "webhook"
    base = models.base(work / "base")
    tuned = [models.fine_tune(base, work / f"ft{number}", number) for number in range(args.pushes)]
    making.init(base, work / "state", making.Recipe(rule="mean"))
    secret = "a-secret-of-the-benchmark"
    own = environment(hub, work) | {"CONTINUAL_WEBHOOK_SECRET": secret}
    flags = ("--hub", "authors=push", "--hub", "settle=0", "--hub", "poll=3600")
    whole, beyond = [], []
    with daemon(work / "state", None, *flags, environment=own) as process:
        address = url(process, work / "state")
        until(lambda: "listening" in (work / "daemon.log").read_text(), "it listens")
        time.sleep(2.0)  # the poll at the start
        for number, directory in enumerate(tuned):
            publish(hub, f"push/ft{number}", directory)
            before = head(work / "state")
            begun = time.perf_counter()
            assert post(f"{address}/webhook", secret, hub.payload(hub.changes[-1])) == 202
            while head(work / "state") == before:
                assert time.perf_counter() - begun < 30, (work / "daemon.log").read_text()[-3000:]
                time.sleep(0.002)
            seconds = time.perf_counter() - begun
            line = until(lambda name=f"push/ft{number}": folded(work / "daemon.log", name), "the log line")
            whole.append(seconds)
            beyond.append(seconds - line)
        process.terminate()
        process.wait()
    print(f"webhook to commit, {len(tuned)} pushes: {spread(whole)}; beyond the fold itself: {spread(beyond)}")


def spread(times: list[float]) -> str:
    """Median and worst of some seconds."""
    return f"median {1e3 * statistics.median(times):.0f} ms, worst {1e3 * max(times):.0f} ms"


def head(state: Path) -> bytes:
    """What names the newest record: the last thing a commit writes."""
    return (state / "HEAD").read_bytes()


def folded(log: Path, model: str) -> float | None:
    """Seconds of the fold of a model as the daemon's log has them."""
    for line in log.read_text().splitlines():
        row = json.loads(line) if line.startswith("{") else {}
        if row.get("event") == "folded" and row.get("model") == model:
            return float(row["seconds"])
    return None
