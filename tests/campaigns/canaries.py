"""How long an alarm in a real Prometheus takes to take a canary back, in intervals of its watch.

    python -m tests.campaigns.canaries --trials 20 --interval 2

A daemon folds fine-tunes and puts each out as a canary, which a real Prometheus watches beside a service whose share of
errors can be set. At a random moment of an interval the errors begin. Counted from the moment at which Prometheus
itself first answers that the alarm fires, until the record of the rollback.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path

from continual import making
from continual.state import State
from continual.state.entries import CanaryEntry, RollbackEntry
from tests.helpers import models
from tests.helpers.prometheus import FIRING, Scraped, scraped
from tests.helpers.services import daemon, status, until, url


def rollbacks(state: Path) -> list[tuple[float, str]]:
    """When each was made, in seconds since 1970, and what it says."""
    with State.open(state) as opened:
        found = [commit for commit in opened.ledger.log if isinstance(commit.entry, RollbackEntry)]
        return [(datetime.fromisoformat(one.time).timestamp(), one.entry.message or "") for one in found]


def trial(prometheus: Scraped, state: Path, address: str, interval: float, draw: random.Random) -> float:
    """Intervals from the alarm to the rollback."""
    done = len(rollbacks(state))
    until(lambda: [c for c in status(address)["canaries"] if c["measurements"] and not c["failed"]], "it is watched")
    time.sleep(draw.uniform(0.0, interval))
    prometheus.errors = 0.5
    while prometheus.ask(FIRING) != [1.0]:
        time.sleep(0.01)
    begun = time.time()
    until(lambda: len(rollbacks(state)) > done, "it is taken back")
    when, said = rollbacks(state)[-1]
    assert f"query {FIRING}: 1 is above max = 0" in said, said
    prometheus.errors = 0.0
    until(lambda: prometheus.ask(FIRING) == [0.0], "the alarm is over")
    return (when - begun) / interval


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--trials", type=int, default=20)
    asked.add_argument("--interval", type=float, default=2.0)
    given = asked.parse_args()
    draw, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as place, scraped(Path(place)) as prometheus:
        tmp = Path(place)
        base = models.base(tmp / "base")
        state, watch = tmp / "state", tmp / "in"
        making.init(base, state)
        watch.mkdir()
        file = tmp / "continual.toml"
        file.write_text(
            f'current = "{tmp}/current"\n[release.canary]\nprometheus = "{prometheus.url}"\n'
            f"query = '{FIRING}'\nmax = 0\ninterval = {given.interval}\n"
        )
        with daemon(state, watch, "--config", str(file)) as process:
            address = url(process, state)
            for number in range(given.trials):
                models.fine_tune(base, watch / f"ft-{number}", number)
                found.append(trial(prometheus, state, address, given.interval, draw))
        with State.open(state) as opened:
            verdicts = [c.entry.canary.verdict for c in opened.ledger.log if isinstance(c.entry, CanaryEntry)]
    assert verdicts == ["failed"] * given.trials, verdicts
    print(f"{given.trials} alarms, intervals of {given.interval:g} s, failure_limit 2 of 5 (the defaults)")
    print(f"from the alarm to the rollback, in intervals: median {statistics.median(found):.2f}, ", end="")
    print(f"smallest {min(found):.2f}, largest {max(found):.2f}")


if __name__ == "__main__":
    main()
