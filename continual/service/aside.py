"""Work that nobody waits for when the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from continual.service.failures import contained
from continual.state.entries import Entry

T = TypeVar("T")
Recorder = Callable[[Entry], Awaitable[None]]
"""Makes a record on the thread that writes the state."""


async def aside(call: Callable[[], T]) -> T:
    """What `call` returns, on a thread that nobody waits for when the process ends: an upload may take hours, and one
    that is cut off has done nothing. Raises what `call` raises."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def succeeded(result: T) -> None:
        if not found.done():
            found.set_result(result)

    def failed(error: Exception) -> None:
        if not found.done():
            found.set_exception(error)

    def run() -> None:
        tell: Callable[[], None]
        try:
            tell = partial(succeeded, contained(call)())
        except Exception as error:
            tell = partial(failed, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name="publish", daemon=True).start()
    return await found
