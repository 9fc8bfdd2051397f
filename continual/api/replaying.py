"""Building a state again in a new place, from its ledger and the models that it folded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from continual.executors.contract import Progress
from continual.replay import Replayed, plan_of, rebuild
from continual.replay.rebuilding import begin
from continual.replay.replay_sources import FoundModel, find, must_be_there
from continual.state import leasing

if TYPE_CHECKING:
    from continual.api.opened_state import OpenedState


class ReplayLook(NamedTuple):
    """What a replay would do: how many records it makes, of which so many `folds`; the models that it reads, each with
    its place or why it cannot be used; and what it does not build again."""

    records: int
    folds: int
    models: tuple[FoundModel, ...]
    left_out: tuple[str, ...]


def look_replay(merge: OpenedState, models: Sequence[Path], progress: Progress) -> ReplayLook:
    """Says what a replay would do. Reads every model once, and builds nothing. Raises Misconfigured where the ledger
    has a record that cannot be made again."""
    plan = plan_of(merge.state)
    found = find(merge.engine, plan.models, models, progress)
    folds = sum(step.kind == "fold" for step in plan.steps)
    return ReplayLook(len(plan.steps), folds, tuple(found.values()), plan.left_out)


def replay(merge: OpenedState, directory: Path, models: Sequence[Path], progress: Progress) -> Replayed:
    """Builds the state of `merge` again in `directory`, and compares. Raises Misconfigured before anything is made
    where a record cannot be made again, or a model is not where it is looked for or holds something else; Refuse, Retry
    and Halt, after which the same call goes on."""
    with leasing.newest(merge.state):
        plan = plan_of(merge.state)
        found = find(merge.engine, plan.models, models, progress)
        must_be_there(found)
        begin(merge.state, directory)
        settings = merge.settings.model_copy(update={"state": directory})
        with type(merge)(settings, write=True, client=merge.places.client) as again:
            return rebuild(merge.state, again.engine, plan, found, progress)
