"""The candidates that wait, and the models that a Frank-Wolfe merge can still weigh: known by where they are, opened
for one pass at a time.

Nothing of a member stays in memory between passes, so a pool takes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from continual.engine.engine import Engine
from continual.engine.folding import run_length
from continual.errors import Refuse
from continual.executors.contract import Progress, Task
from continual.records import Lineage
from continual.tensors import Model, Place, TaskVectors, candidate_of, open_model

T = TypeVar("T")


class Member(NamedTuple):
    """A model by reference, as a record names it; `at` is where it is now, if that is somewhere else."""

    identity: Mapping[str, Any]
    at: Place | None = None

    @property
    def key(self) -> str:
        """The candidate's key."""
        return str(self.identity["key"])

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.identity["name"])

    @property
    def form(self) -> str:
        """`full` or `adapter`."""
        return str(self.identity["form"])


class Opened(NamedTuple):
    """A member while it is read."""

    model: Model
    lineage: Lineage
    vectors: TaskVectors


@contextmanager
def opened(engine: Engine, member: Member) -> Iterator[Opened]:
    """A member's task vectors. Raises Refuse with the reason `gone` where its files are not those that were seen, Retry
    where they cannot be read now."""
    place = member.at or engine.locate(member.identity)
    place.must_be_there()
    with open_model(place) as model:
        if candidate_of(model).key != member.key:
            raise Refuse(
                "gone",
                f"{member.name}: the files in {place} are not those that were seen; they are looked at as a new candidate",
            )
        lineage = engine.lineage(model)
        yield Opened(
            model,
            lineage,
            TaskVectors(engine.base, model, lineage, run=run_length(engine.device), buffers=engine.buffers),
        )


def over(
    engine: Engine, members: Sequence[Member], look: Callable[[Member, Opened], T], stage: str, progress: Progress
) -> dict[str, T | Refuse]:
    """What `look` finds in each member, several at a time, by key; or why it cannot be had. Raises Retry, and Abandoned
    when told to stop."""

    def one(member: Member) -> T | Refuse:
        engine.go_on(member.name)
        try:
            with opened(engine, member) as found:
                result = look(member, found)
                found.model.check_unchanged()
                return result
        except Refuse as refusal:
            return refusal

    found: dict[str, T | Refuse] = {}
    tasks = [Task(member.key, _need(engine, member), partial(one, member)) for member in members]
    progress(stage, 0, len(tasks))
    for key, result in engine.executor.map(tasks):
        found[key] = result
        progress(stage, len(found), len(tasks))
    return found


def _need(engine: Engine, member: Member) -> int:
    """Peak bytes of a pass over a member, one tensor after the other; of an adapter, with the product of its largest
    factors."""
    largest = max((spec.numel for spec in engine.base.specs), default=0) if member.form == "adapter" else 0
    return 4 * 4 * run_length(engine.device) + 3 * 4 * largest
