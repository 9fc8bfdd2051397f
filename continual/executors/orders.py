"""Work that any process can do: a job says, as plain data, all that its pieces have in common, and an order names some
of the pieces. `work` does an order, on a thread of this process or on another machine alike. Nothing here knows what
the work is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar, cast

from continual.executors.contract import Task

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
PIECES = 1000
"""Pieces that an order has at most: of a thousand small tensors each takes about a millisecond."""


class Bench(Protocol[R_co]):
    """What a job needs, open in one process."""

    def work(self, names: Sequence[str]) -> Sequence[R_co]:
        """Does the pieces of these names, one after the other; what each gave."""
        ...

    def close(self) -> None:
        """Closes what was opened for the job alone."""
        ...


@dataclass(frozen=True)
class WorkJob(ABC, Generic[R]):
    """What pieces of work have in common. It can be pickled, and holds no values of tensors. `id` is no other's."""

    id: str

    @abstractmethod
    def open(self) -> Bench[R]:
        """Opens all of it in a process that has nothing of it yet. Raises Refuse, Retry, Halt."""


class WorkOrder(NamedTuple, Generic[R]):
    """Pieces of a job, to be done by one process, one after the other."""

    job: WorkJob[R]
    names: tuple[str, ...]


@dataclass(frozen=True)
class WorkPiece(Generic[R]):
    """One piece of a job, as a task runs it (`Task.run`). Pieces that have the same word in `whole` are done by one
    order, however much that is."""

    job: WorkJob[R]
    name: str
    whole: str = ""

    def __call__(self) -> R:
        return work(WorkOrder(self.job, (self.name,)))[0]


def groups(tasks: Sequence[Task[R]], most: int) -> Iterator[list[Task[R]]]:
    """Tasks in the order given, those together that one order takes: pieces of one job that read at most `most` bytes,
    PIECES at most and at least one, or all that are one whole. What is no piece comes as it is, as many together as
    follow each other."""
    group: list[Task[R]] = []
    reads = 0
    for task in tasks:
        kind = _kind(task)
        full = len(group) >= PIECES or reads + task.reads > most
        if group and (kind != _kind(group[0]) or (kind[0] and not kind[1] and full)):
            yield group
            group, reads = [], 0
        group.append(task)
        reads += task.reads
    if group:
        yield group


def order_of(group: Sequence[Task[R]]) -> WorkOrder[R] | None:
    """The order for tasks that `groups` put together; None where they are no pieces of a job."""
    pieces = [task.run for task in group if isinstance(task.run, WorkPiece)]
    return WorkOrder(pieces[0].job, tuple(piece.name for piece in pieces)) if pieces else None


def _kind(task: Task[R]) -> tuple[str, str]:
    return (task.run.job.id, task.run.whole) if isinstance(task.run, WorkPiece) else ("", "")


def work(order: WorkOrder[R]) -> Sequence[R]:
    """Does an order: what each of its pieces gave. What the job needs is open already where the process has it at hand,
    or did an order of the same job last."""
    bench = _AT_HAND.get(order.job.id)
    if bench is None:
        bench = _opened(order.job)
    return cast("Bench[R]", bench).work(order.names)


@contextmanager
def at_hand(job: WorkJob[R], bench: Bench[R]) -> Iterator[None]:
    """While it lasts, orders of `job` that this process does are done on `bench`, which it has open."""
    _AT_HAND[job.id] = bench
    try:
        yield
    finally:
        del _AT_HAND[job.id]


_AT_HAND: dict[str, Bench[object]] = {}
_LAST: list[tuple[str, Bench[object]]] = []
"""What was opened for the job that this process worked on last: at most one."""


def _opened(job: WorkJob[R]) -> Bench[object]:
    """Only a process that does one order at a time opens jobs."""
    if _LAST and _LAST[0][0] == job.id:
        return _LAST[0][1]
    while _LAST:
        _LAST.pop()[1].close()
    bench = cast("Bench[object]", job.open())
    _LAST.append((job.id, bench))
    return bench
