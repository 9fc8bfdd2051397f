"""The kill campaign: SIGKILL a loop of real folds at chosen and random instants, and look at what is left each time.

    python -m tests.campaigns.faults.kills --kills 200 [--adapters] [--span 4] [--store moto|seaweedfs]

A child process folds model after model and announces each step of the commit protocol through a pipe before it begins.
The parent draws a step and kills either while the child still waits for leave to begin it, or a random moment after.
After each kill the state must open at the last acknowledged fold, or one further if its link was done, and `verify`
must be clean; at the end it must be bit-equal to an uninterrupted run's. `--adapters`: adapters into a state that keeps
them as they are, and cuts them more and more. `--span`: an excerpt of the ledger is of so many records, so that kills
fall beside it, and what is folded next goes by it. `--store`: the state is on an object store, whose lease is 5
seconds, so that whoever opens it after a kill waits for that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from continual.state import State, excerpts
from continual.state.backup import Wish, backup
from continual.state.excerpts import Sealed
from continual.state.verify import verify
from continual.stores import ObjectPath, Where, where
from tests.helpers import object_stores

LEASE = 5.0
STEPS = ("begin", "chunks", "fsync-files", "fsync-dirs", "temp-commit", "link", "fsync-commits", "head", "acknowledged")


def fold_loop(state: str, models: list[str], pipe: Connection | None, span: int) -> None:
    """The child: folds every model in order; before each step it says so and waits for leave."""
    from continual.api import Merge
    from continual.config import settings_of

    excerpts.SPAN = span

    def announce(step: str) -> None:
        if pipe is not None:
            pipe.send((step, merge.state.ledger.head.seq))
            pipe.recv()

    merge = Merge(settings_of({"state": state, "workers": 2, "lease": LEASE}), write=True, on_step=announce)
    with merge:
        for model in models:
            merge.fold(model)
    if pipe is not None:
        pipe.send(("done", merge.state.ledger.head.seq))


def campaign(
    work: Path, kills: int, seed: int = 0, *, kept: bool = False, at: Where | None = None
) -> dict[str, object]:
    """Runs the campaign under `work`, with `kept` on a state that keeps adapters as they are, `at` a place on an object
    store; returns the histogram and counts. Raises AssertionError at the first broken promise."""
    from continual import making
    from tests.helpers import adapters, models

    work.mkdir(parents=True, exist_ok=True)
    base = models.base(work / "base")
    make = adapters.lora if kept else lambda directory, base, seed: models.fine_tune(base, directory, seed)
    fine_tunes = [str(make(work / f"ft-{i:03d}", base, i)) for i in range(max(8, kills))]
    state, straight = at or work / "state", work / "straight"
    making.init(base, state, making.Recipe(width=16 if kept else None))
    backup(state, straight, Wish(copy=True), lambda _what, _done, _all: None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "continual.api.merge"])  # what is lazy would be loaded in each
    draw = random.Random(seed)
    fell: Counter[str] = Counter()
    inside = 0
    acknowledged = 0
    for number in range(kills):
        target, skip = STEPS[number % len(STEPS)], draw.randrange(2)
        last, acknowledged = _one_kill(context, state, fine_tunes, target, skip, draw, acknowledged)
        fell[last] += 1
        inside += last in STEPS[:-1]
        _check(state, last, acknowledged)
    _finish(context, state, fine_tunes)
    _finish(context, straight, fine_tunes)
    assert _folded(state) == _folded(straight), "the ledgers differ from an uninterrupted run's"
    assert _bits(state) == _bits(straight), "the end state differs from an uninterrupted run's"
    return {
        "kills": kills,
        "records known by excerpts": _sealed(state),
        "between begin and acknowledgement": inside,
        "by step": {s: fell[s] for s in ("outside", *STEPS)},
        "folds": len(_folded(state)),
    }


def _one_kill(
    context: multiprocessing.context.ForkServerContext,
    state: Where,
    fine_tunes: list[str],
    target: str,
    skip: int,
    draw: random.Random,
    acknowledged: int,
) -> tuple[str, int]:
    """Starts the loop and kills it at `target` of a fold after `skip` whole ones; returns the step it fell in and the
    last acknowledged record."""
    ours, theirs = context.Pipe()
    child = context.Process(target=fold_loop, args=(str(state), fine_tunes, theirs, excerpts.SPAN))
    child.start()
    theirs.close()
    last, seen = "outside", 0
    waits = draw.random() < 0.5
    try:
        while ours.poll(60):
            step, head = ours.recv()
            last, acknowledged = step, max(acknowledged, head)
            if step == "done":
                break
            if step == target and seen >= skip:
                if not waits:
                    ours.send(True)
                    time.sleep(draw.random() * (0.02 if step == "chunks" else 0.002))
                break
            seen += step == "acknowledged"
            ours.send(True)
        os.kill(child.pid or 0, signal.SIGKILL)
        while ours.poll(0):  # it may have begun further steps before it died
            step, head = ours.recv()
            last, acknowledged = step, max(acknowledged, head)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
    child.join()
    return last, acknowledged


def _check(state: Where, last: str, acknowledged: int) -> None:
    with State.open(state, write=True) as opened:
        head = opened.ledger.head.seq
        linked = STEPS.index(last) >= STEPS.index("link") if last in STEPS else False
        assert head == acknowledged or (linked and head == acknowledged + 1), (
            f"head {head}, acknowledged {acknowledged}, killed in {last}"
        )
        findings = verify(opened)
        assert not findings, findings
        if isinstance(state, ObjectPath):  # what nobody names goes there when nothing can come of it any more
            return
        left = {p.name for p in (state / "generations").iterdir()}
        assert left == {c.generation for c in opened.ledger.log if c.generation} & left, "an orphan survived the open"


def _finish(context: multiprocessing.context.ForkServerContext, state: Where, fine_tunes: list[str]) -> None:
    child = context.Process(target=fold_loop, args=(str(state), fine_tunes, None, excerpts.SPAN))
    child.start()
    child.join()
    assert child.exitcode == 0, child.exitcode


def _folded(state: Where) -> list[tuple[str | None, float]]:
    with State.open(state) as opened:
        return [(c.entry.digest, c.entry.numbers.tau_norm) for c in opened.ledger.folds()]


def _sealed(state: Where) -> int:
    with State.open(state) as opened:
        return sum(isinstance(commit, Sealed) for commit in opened.ledger.log)


def _bits(state: Where) -> dict[tuple[str, str], bytes]:
    with State.open(state) as opened:
        return {
            (name, slot): opened.read(name, slot).tobytes()
            for name, slots in opened.format.slots.items()
            for slot in slots
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", action="store_true", help="adapters into a state that keeps them as they are")
    parser.add_argument("--span", type=int, default=excerpts.SPAN, help="records that an excerpt is of")
    parser.add_argument("--store", choices=("moto", "seaweedfs"), help="the state is on this object store")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary directory")
    args = parser.parse_args()
    excerpts.SPAN = args.span
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        at = None
        if args.store:
            address = stack.enter_context(object_stores.serving(args.store, Path(temporary)))
            os.environ.update(object_stores.environment(address))
            at = where(f"s3://{object_stores.BUCKET}/kills", LEASE)
        result = campaign(args.dir or Path(temporary) / "kills", args.kills, args.seed, kept=args.adapters, at=at)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
