"""What an executor is, and what it is given. Nothing here knows what the work is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while work goes on."""


class Task(NamedTuple, Generic[T]):
    """A piece of work.

    `need`: bytes that it takes at its peak. `run` does the work, on a thread of the executor's choice; a `WorkPiece`
    (orders.py) on any machine. `prefetch` asks the kernel to read the task's input ahead. `reads`: bytes that it reads,
    as far as it is known.
    """

    name: str
    need: int
    run: Callable[[], T]
    prefetch: Callable[[], None] | None = None
    reads: int = 0


class Executor(Protocol):
    """Where tasks run: at most `workers` at a time, whose needs add up to at most `budget` bytes. A task that needs
    more than that runs alone.

    Torch has one thread inside a task, so that the bits of a result do not depend on where it runs. The suite in
    tests/unit/executors/test_contract.py says what else holds for every executor.
    """

    @property
    def workers(self) -> int: ...

    @property
    def budget(self) -> int: ...

    @property
    def elsewhere(self) -> str | None:
        """Where other processes do the pieces of jobs: the device that they compute on, as the setting `device` has it;
        None where all is done in this process."""
        ...

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Runs the tasks. They begin in the order given; each result is yielded as (name, result) when its task ends.

        Raises the first error of a task: no further task begins, and what runs has ended before.
        """
        ...


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""
