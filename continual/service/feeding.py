"""What the sources give goes into the queue. A source that ends, or in which an exception is raised that nobody
expected, is started again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from continual.errors import ContinualError, Damaged
from continual.records import Event
from continual.retrying import retry_delay
from continual.service.failures import Failures, told
from continual.sources.contract import Source

Put = Callable[[Event, Source], None]
_STEADY = 60.0
"""Seconds that a source runs until what was wrong before counts as over."""


async def feed(source: Source, put: Put, failures: Failures, stop: asyncio.Event) -> None:
    """Gives `put` what a source gives, until `stop` is set. Raises Damaged."""
    loop = asyncio.get_running_loop()
    failed = 0
    while not stop.is_set():
        begun = loop.time()
        steady = loop.call_later(_STEADY, _over, source, source.problem)
        try:
            async for event in source.events(stop):
                put(event, source)
            if stop.is_set():
                return
            raise RuntimeError("the source ended, though nobody had told it to")
        except Damaged:
            raise
        except Exception as error:
            failed = 1 if loop.time() - begun > _STEADY else failed + 1
            source.problem = told(error)
            if isinstance(error, ContinualError):
                failures.metrics.error("source")
                structlog.get_logger("continual").error("source failed", what=source.name, error=told(error))
            else:
                failures.tell(error, kind="source", what=source.name)
        finally:
            steady.cancel()
        source.scanned.set()  # nobody waits for its first look for ever
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), retry_delay(failed))


def _over(source: Source, problem: str | None) -> None:
    """Forgets what was wrong with a source, unless it says something else of itself by now."""
    if source.problem == problem:
        source.problem = None
