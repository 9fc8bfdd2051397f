"""Work that is asked for while a daemon runs, until the thread that writes the state has a turn for it: between two
folds, in the order in which it came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from continual.errors import Abandoned, Halt, Retry

T = TypeVar("T")
MOST = 64
"""Turns that may wait."""


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """One piece of work: what the status page calls it, what does it, and what came of it."""

    title: str
    call: Callable[[], T]
    done: asyncio.Future[T]

    async def run(self, on_thread: Callable[[Callable[[], T]], Awaitable[T]]) -> Halt | None:
        """Does the work there; who asked for it gets what it returns or raises. Returns the Halt after which nobody may
        go on writing: an fsync that failed. A wrong word of a person, or damage to what is not in force, is none."""
        if self.done.done():  # who asked has gone
            return None
        try:
            found = await on_thread(self.call)
        except Exception as error:
            if not self.done.done():
                self.done.set_exception(error)
            return error if type(error) is Halt else None
        if not self.done.done():
            self.done.set_result(found)
        return None


class Turns:
    """The work that waits. All methods are called on the event loop; `wake` is called when there is some."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[Turn[object]] = deque()
        self._closed = False

    async def ask(self, title: str, call: Callable[[], T]) -> T:
        """Has `call` run when its turn comes, and returns what it returns. Where the caller is cancelled before, it is
        not run. Raises what `call` raises, Abandoned where the daemon stops, Retry where too much waits."""
        if self._closed:
            raise Abandoned("the daemon is stopping; nothing was done")
        if len(self._waiting) >= MOST:
            raise Retry(f"{MOST} commands wait for the daemon already; nothing was done")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(Turn(title, call, done))  # type: ignore[arg-type]
        self._wake()
        return await done

    def take(self) -> Turn[object] | None:
        """The next piece of work; None if none waits."""
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Nothing more is done: who waits hears that the daemon stops."""
        self._closed = True
        while self._waiting:
            done = self._waiting.popleft().done
            if not done.done():
                done.set_exception(Abandoned("the daemon is stopping; nothing was done"))
