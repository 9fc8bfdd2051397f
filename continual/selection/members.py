"""Members of a round: the candidates that wait, and the models that Frank-Wolfe can still weigh. A member is
known by its record and where its files are; it is opened for one pass at a time.

Between passes nothing of a member is in memory, so the memory that a round needs does not grow with the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from continual.engine.engine import Engine
from continual.engine.folding import run_length
from continual.errors import Refuse
from continual.executors.contract import Progress, Task
from continual.records import Candidate, Lineage
from continual.tensors import Model, Place, TaskVectors, candidate_of, open_model

T = TypeVar("T")


class Member(NamedTuple):
    """A model as the records name it. `at`: where its files are now, as somebody says. Files there are taken for the
    member's whatever their state; who says so compares the content with the records."""

    candidate: Candidate
    at: Place | None = None

    @property
    def key(self) -> str:
        """The candidate's key."""
        return self.candidate.key

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return self.candidate.name

    @property
    def form(self) -> str:
        """`full` or `adapter`."""
        return self.candidate.form


class Opened(NamedTuple):
    """A member while it is read."""

    model: Model
    lineage: Lineage
    vectors: TaskVectors


@contextmanager
def opened(engine: Engine, member: Member) -> Iterator[Opened]:
    """Opens a member's task vectors. Raises Refuse with the reason `gone` where its files are not those that were seen,
    Retry where they cannot be read now."""
    place = member.at or engine.locate(member.candidate)
    place.must_be_there()
    with open_model(place) as model:
        if member.at is None and candidate_of(model).key != member.key:
            raise Refuse(
                "gone",
                f"{member.name}: the files in {place} are not those that were seen; "
                "they are looked at as a new candidate",
            )
        lineage = engine.lineage(model)
        vectors = TaskVectors(engine.base, model, lineage, run=run_length(engine.device), buffers=engine.buffers)
        yield Opened(model, lineage, vectors)


def over(
    engine: Engine, members: Sequence[Member], look: Callable[[Member, Opened], T], stage: str, progress: Progress
) -> dict[str, T | Refuse]:
    """Opens several members at a time; returns by key what `look` finds in each, or the refusal where a member cannot
    be had. Raises Retry, and Abandoned when told to stop."""

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
    """Peak bytes of a pass over a member, one tensor after the other; for an adapter, with what its largest piece
    takes: the base's tensor, and products of its shape."""
    largest = max((spec.numel for spec in engine.base.specs), default=0) if member.form == "adapter" else 0
    return 4 * 4 * run_length(engine.device) + 6 * 4 * largest
