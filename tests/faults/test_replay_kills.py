"""A replay that is killed goes on where it was, and its state is the same in the end."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from continual import api, making
from continual.config import Settings
from continual.state import State
from continual.state.strays import strays
from continual.state.verify import verify
from tests.faults.test_upkeep_steps import UNDISTURBED, forked
from tests.faults.test_upkeep_steps import opened as newest
from tests.helpers import calls, models
from tests.helpers.calls import Counter
from tests.integration.test_replay import opened

pytestmark = pytest.mark.slow
EACH = int(os.environ.get("CONTINUAL_EACH_CALL", "61"))
SHAPES = {"a.weight": (8, 4), "b.weight": (4, 6), "norm": (4,)}


def lived(place: Path) -> Path:
    """Folds, a tag, a rollback, and an unfold for which the later ones were folded again from an expired record."""
    base, state = models.base(place / "base", shapes=SHAPES), place / "state"
    making.init(base, state, making.Recipe("opcm"))
    with opened(state) as merge:
        for number, name in enumerate("abcd"):
            assert merge.fold(models.fine_tune(base, place / name, number)).fate == "folded"
            if name == "b":
                merge.state.tag("two")
        merge.state.rollback(4)
        merge.fold(models.fine_tune(base, place / "e", 5))
        merge.unfold(merge.look_unfold("b"))
        merge.fold(models.fine_tune(base, place / "f", 6))
    return state


def replayed(state: Path, target: Path, counter: Counter) -> None:
    """The process ends so that one can see whether the counter came to its call."""
    with calls.watched(target, counter), api.Merge(Settings(state=state)) as merge:
        merge.replay(target)
    assert counter.at is not None
    if counter.count < counter.at:
        os._exit(UNDISTURBED)


def test_a_replay_that_is_killed_goes_on(tmp_path: Path) -> None:
    state, target = lived(tmp_path), tmp_path / "again"
    kills = 0
    for number in range(1, 5000, EACH):
        shutil.rmtree(target, ignore_errors=True)
        code = forked(partial(replayed, state, target, Counter(calls.changes, number, calls.kill)))
        if code == UNDISTURBED:
            break
        assert code == calls.KILLED, number
        kills += 1
        left = newest(target)
        assert not isinstance(left, str) or "no state" in left, number
        with api.Merge(Settings(state=state)) as merge:
            found = merge.replay(target)
        assert (found.equal, found.differs) == (True, ()), number
        with State.open(target) as there:
            assert (verify(there), strays(there.path, there.format, there.ledger)) == ([], []), number
            assert [fold.entry.candidate.name for fold in there.ledger.folds()] == ["a", "c", "e", "f"]
            assert there.ledger.tags.keys() == {"two"}
    assert kills > 3
