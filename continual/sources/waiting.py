"""Waiting for the first of several things on the event loop."""

from __future__ import annotations

import asyncio


async def first(seconds: float, *events: asyncio.Event) -> None:
    """Returns when one of `events` is set or `seconds` have passed."""
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
