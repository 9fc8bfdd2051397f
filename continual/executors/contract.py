"""What an executor is, and what it is given. Nothing here knows what the work is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while work goes on."""


class Task(NamedTuple, Generic[T]):
    """A piece of work: `need` is its peak memory in bytes, `prefetch` asks the kernel for its input ahead of time."""

    name: str
    need: int
    run: Callable[[], T]
    prefetch: Callable[[], None] | None = None


class Executor(Protocol):
    """Where tasks run: at most `workers` at a time, together under `budget` bytes."""

    workers: int
    budget: int

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Results as (name, result) in any order; the first error is raised once nothing runs any more."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""
