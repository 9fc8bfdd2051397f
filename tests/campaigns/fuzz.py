"""The fuzz campaign: every parser of bytes that others wrote, on many wrong inputs; what comes of them, and how long
the slowest took.

    python -m tests.campaigns.fuzz --inputs 200000 --report fuzz.json

The parsers are the table in tests/helpers/parsers.py. Inputs are valid ones with hostile values in their places, cut
and spliced ones, and bytes that mean nothing; one in twenty is made by Hypothesis. Only errors of ours may come of
them, and none may take more than `--limit` milliseconds of processor time: that of the thread, so that a busy machine
tells no lies. What took a tenth of it is measured again, twice, and the least counts. Ends with 1 if a promise was
broken.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.helpers.parsers import OWN, Parser, table

KEPT = 5


@dataclass
class Figures:
    """What came of the inputs of one parser. `slowest`: milliseconds, bytes, and how the input begins."""

    inputs: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    broken: str | None = None

    def add(self, data: bytes, seconds: float, outcome: str) -> None:
        """Counts an input."""
        self.inputs += 1
        self.nbytes += len(data)
        self.seconds += seconds
        self.outcomes[outcome] += 1
        heapq.heappush(self.slowest, (round(1000 * seconds, 2), len(data), repr(data[:60])))
        if len(self.slowest) > KEPT:
            heapq.heappop(self.slowest)


def once(parser: Parser, data: bytes) -> tuple[float, str]:
    """Seconds of processor time that an input takes, and what came of it. Raises what is no error of ours."""
    begun = time.thread_time()
    try:
        parser.call(data)
    except parser.raises as error:
        seconds, said = time.thread_time() - begun, error
    else:
        return time.thread_time() - begun, "read"
    assert not isinstance(said, OWN) or str(said).isprintable(), repr(said)
    return seconds, str(getattr(said, "reason", type(said).__name__))


def fuzz(parser: Parser, inputs: int, limit: float, start: int) -> Figures:
    """Runs one parser on `inputs` inputs; `start` is the seed."""
    figures = Figures()

    def holds(data: bytes) -> None:
        seconds, outcome = once(parser, data)
        if seconds > limit / 10:
            seconds = min(seconds, once(parser, data)[0], once(parser, data)[0])
        figures.add(data, seconds, outcome)
        assert seconds <= limit, f"{1000 * seconds:.0f} ms of processor time for {len(data)} bytes"

    searched = settings(
        max_examples=max(1, inputs // 20),
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(parser.inputs.strategy)(holds))
    chance = random.Random(f"{parser.name} {start}")
    data = b""
    try:
        seed(start)(searched)()
        for _ in range(inputs - inputs // 20):
            data = parser.inputs.draw(chance)
            holds(data)
    except BaseException:
        trace = "\n".join(line[:300] for line in traceback.format_exc().splitlines())
        figures.broken = f"{trace}\nlast input drawn: {data[:2000]!r}"
    return figures


def shares(parsers: tuple[Parser, ...], inputs: int) -> dict[str, int]:
    """How many inputs each parser gets."""
    return {parser.name: -(-inputs // len(parsers)) for parser in parsers}


def told(name: str, figures: Figures) -> str:
    """A row of the table."""
    worst = max(figures.slowest, default=(0.0, 0, ""))
    outcomes = ", ".join(f"{word} {count}" for word, count in figures.outcomes.most_common(4))
    state = "BROKEN" if figures.broken else "held"
    return f"{name:24} {figures.inputs:8} {state:7} {worst[0]:9.2f} {worst[1]:9}  {outcomes}"


def campaign(inputs: int, limit: float, start: int, only: str | None = None) -> dict[str, Figures]:
    """Runs all parsers, or `only` one; prints a row for each."""
    parsers = tuple(parser for parser in table() if only in (None, parser.name))
    wanted = shares(parsers, inputs)
    print(f"{'parser':24} {'inputs':>8} {'state':7} {'worst, ms':>9} {'of bytes':>9}  outcomes", flush=True)
    found = {}
    gc.freeze()  # what is loaded already is no garbage of an input
    for parser in parsers:
        found[parser.name] = fuzz(parser, wanted[parser.name], limit, start)
        print(told(parser.name, found[parser.name]), flush=True)
    return found


def main() -> int:
    """Runs the campaign as the arguments say."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--inputs", type=int, default=200_000, help="wrong inputs, over all parsers")
    flags.add_argument("--limit", type=float, default=100.0, help="milliseconds of processor time for one input")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--only", help="one parser, by its name")
    flags.add_argument("--report", type=Path, help="where the figures go, as JSON")
    asked = flags.parse_args()
    begun = time.monotonic()
    found = campaign(asked.inputs, asked.limit / 1000, asked.seed, asked.only)
    broken = {name: figures.broken for name, figures in found.items() if figures.broken}
    total = sum(figures.inputs for figures in found.values())
    worst = max((row for figures in found.values() for row in figures.slowest), default=(0.0, 0, ""))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(
        f"{total} inputs in {time.monotonic() - begun:.0f} s, {len(broken)} parsers broken, the slowest input took "
        f"{worst[0]} ms ({worst[1]} bytes), at most {memory:.0f} MB of memory in all"
    )
    if asked.report is not None:
        body = {name: {**vars(figures), "slowest": sorted(figures.slowest)} for name, figures in found.items()}
        asked.report.write_text(json.dumps({"seed": asked.seed, "parsers": body}, indent=2) + "\n", "utf-8")
    for name, trace in broken.items():
        print(f"\n{name}:\n{trace}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
