"""SIGTERM, SIGINT and SIGHUP for as long as a service runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

STOPS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def taken(handle: Callable[[int], None], reload: Callable[[], None]) -> Iterator[None]:
    """Calls `handle` on the running event loop for each signal that asks the process to stop, and `reload` for the one
    that has settings read again; at the end the handlers of before are back. Only in the main thread."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGHUP)}
    for number in STOPS:
        loop.add_signal_handler(number, handle, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            if handler is not None:  # None: it was not set from Python
                signal.signal(number, handler)
