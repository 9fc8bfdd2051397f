"""SIGKILL at random instants of a round, in a real process, again and again until it ends: the end is that of a round
which nobody disturbed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from continual import api, making
from continual.selection.active import active_at
from continual.state.verify import verify
from tests.helpers import quadratic

pytestmark = pytest.mark.slow

KILLS = 7


def opened(state: Path, select: str | None) -> api.Merge:
    return api.open(
        state,
        write=True,
        select=select,
        objective="tests.helpers.quadratic:make",
        max_base_ratio=10,
        device="cpu",
        workers=1,
    )


def child(state: Path, select: str | None, pipe: Connection) -> None:
    """Takes up what is open, or runs a round; says when it begins and when it is done."""
    with opened(state, select) as merge:
        merge.base  # noqa: B018
        pipe.send("begins")
        merge.round()
    pipe.send("done")


def found(state: Path, select: str | None) -> Any:
    """What matters in the end."""
    with opened(state, select) as merge:
        assert verify(merge.state) == []
        assert merge.state.ledger.open_round is None
        slots = merge.state.format.slots
        bits = {(n, s): merge.state.read(n, s).tobytes() for n in slots for s in slots[n]}
        folds = [c.entry.candidate.name for c in merge.state.ledger.folds()]
        pool = [w.candidate.name for w in merge.pool().values()]
        first = next(c for c in merge.state.ledger.log if c.entry.kind == "select")
        table = [(r.name, r.fate, r.score, r.z, r.weight) for r in first.entry.scores]
        return bits, folds, pool, table, active_at(merge.state).weights


def ended(state: Path, select: str | None) -> bool:
    """Whether there is nothing left to take up."""
    with opened(state, select) as merge:
        chosen = [w for w in merge.pool().values() if w.last and w.last.fate == "chosen"]
        return (
            merge.state.ledger.open_round is None
            and not chosen
            and any(c.entry.kind == "select" for c in merge.state.ledger.log)
        )


def full(base: Path) -> list[Path]:
    return [quadratic.noise(base, 0), *(quadratic.good(base, k) for k in range(3)), quadratic.noise(base, 1)]


def adapters(base: Path) -> list[Path]:
    return [quadratic.lora(base, None, "noise0"), *(quadratic.lora(base, k, f"good{k}") for k in range(3))]


@pytest.mark.parametrize(("rule", "width"), [("iso-c", None), ("frank-wolfe", None), ("frank-wolfe", 64)])
def test_kills_in_a_round_change_nothing(tmp_path: Path, rule: str, width: int | None) -> None:
    base, state, straight = quadratic.world(tmp_path), tmp_path / "state", tmp_path / "straight"
    select = None if rule == "frank-wolfe" else "relevance"
    making.init(base, state, making.Recipe(rule=rule, width=width))
    with opened(state, select) as merge:
        for path in full(base) if width is None else adapters(base):
            assert merge.fold(path).fate == "deferred"
    shutil.copytree(state, straight)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "continual.api.merge", "tests.helpers.quadratic"])

    def run(place: Path, after: float | None) -> float | None:
        """Seconds the round took, None where it was killed `after` so many."""
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(place, select, theirs))
        process.start()
        theirs.close()
        assert ours.recv() == "begins"
        begun = time.monotonic()
        try:
            if after is None or ours.poll(after):
                assert ours.recv() == "done"
                return time.monotonic() - begun
            os.kill(process.pid or 0, signal.SIGKILL)
            return None
        finally:
            process.join()

    whole = run(straight, None)
    assert whole is not None
    draw, killed = random.Random(1), 0
    for _ in range(KILLS if width is None else 3):
        killed += run(state, whole * draw.uniform(0.1, 0.95)) is None
        if ended(state, select):
            break
    if not ended(state, select):
        assert run(state, None) is not None
    assert killed >= 1
    assert found(state, select) == found(straight, select)
