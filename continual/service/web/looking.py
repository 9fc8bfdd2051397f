"""How the pages look at the state: on threads of their own, so that neither the event loop nor a fold waits for a page;
and what a request may ask for, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from continual.service.web.recalled import RowsWanted
from continual.service.web.seen import View
from continual.service.web.view import Status

T = TypeVar("T")
LONGEST = 500
"""Characters of a text that is searched for."""
MOST = 1000
"""Rows of a list at most."""
_LARGEST = 10**15
_THREADS = 2


class AskedWrongly(ValueError):
    """Something was asked for that makes no sense; the message says what would."""


class PageLook:
    """Looks at what `view` tells. The status is asked for once at a time: who asks meanwhile gets the same answer."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._threads = ThreadPoolExecutor(_THREADS, "page")
        self._under_way: asyncio.Future[Status] | None = None

    async def aside(self, call: Callable[[], T]) -> T:
        """What `call` returns, on a thread for pages."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def status(self) -> Status:
        """Everything there is to show of the present."""
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.ensure_future(self.aside(self.view.status))
        return await asyncio.shield(self._under_way)


def wanted(request: Request, limit: int = 50) -> RowsWanted:
    """The rows of a list that are asked for: `q`, `before`, `limit`. Raises AskedWrongly."""
    search = request.query_params.get("q", "").strip()
    if len(search) > LONGEST:
        raise AskedWrongly(f"q has at most {LONGEST} characters")
    most = number(request, "limit", limit)
    assert most is not None
    if not 1 <= most <= MOST:
        raise AskedWrongly(f"limit is from 1 to {MOST}")
    return RowsWanted(search, number(request, "before"), most)


def in_path(request: Request, called: str) -> int:
    """The number in the path of an address; one that no record has where it is none."""
    text = str(request.path_params[called])
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else _LARGEST


def number(request: Request, called: str, default: int | None = None) -> int | None:
    """A whole number of the address, not below zero. Raises AskedWrongly."""
    text = request.query_params.get(called)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise AskedWrongly(f"{called} is a whole number from 0 to {_LARGEST - 1}")
    return int(text)
