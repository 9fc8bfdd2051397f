"""`continual status --watch`: the status again and again. On a terminal it is drawn in place, without a flicker, until
Ctrl-C; elsewhere a line is printed when something has changed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len, set_cell_size

from continual.cli import console
from continual.cli.status import text
from continual.errors import Retry

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The other screen of the terminal, without a cursor; and back to what stood there before."""
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(ask: Callable[[], Mapping[str, Any]], every: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Shows what `ask` says every so many seconds, until Ctrl-C. Raises what `ask` raises."""
    try:
        if sys.stdout.isatty():
            _draw(ask, every, sleep)
        else:
            _print(ask, every, sleep)
    except KeyboardInterrupt:
        return


def _draw(ask: Callable[[], Mapping[str, Any]], every: float, sleep: Callable[[float], None]) -> None:
    with _screen():
        while True:
            told = _seen(ask, text)
            columns, rows = shutil.get_terminal_size()
            now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}, every {every:g} s; Ctrl-C ends this"
            lines = fitted([now, "", *told.splitlines()], columns, rows)
            sys.stdout.write(_HOME + "".join(f"{line}{_REST_OF_LINE}\n" for line in lines[:-1]))
            sys.stdout.write(f"{lines[-1]}{_REST_OF_LINE}{_REST}")
            sys.stdout.flush()
            sleep(every)


def _seen(ask: Callable[[], Mapping[str, Any]], told: Callable[[Mapping[str, Any]], str]) -> str:
    """What is told of a status; where a look fails that can be made again, why."""
    try:
        return told(ask())
    except Retry as error:
        return str(error)


def fitted(lines: list[str], columns: int, rows: int) -> list[str]:
    """What a screen has room for: long lines end in `…`, and the last row says how many lines are left out."""
    cut = [line if cell_len(line) <= columns else set_cell_size(line, max(0, columns - 1)) + "…" for line in lines]
    more = len(cut) - rows
    return cut if more <= 0 else [*cut[: max(0, rows - 1)], f"… {more + 1} more lines"]


@contextmanager
def _screen() -> Iterator[None]:
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _print(ask: Callable[[], Mapping[str, Any]], every: float, sleep: Callable[[float], None]) -> None:
    last = ""
    while True:
        now = _seen(ask, brief)
        if now != last:
            console.say(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {now}")
            sys.stdout.flush()
            last = now
        sleep(every)


def brief(body: Mapping[str, Any]) -> str:
    """A status in one line: health, record, what is folded and waits, what goes on, and what is wrong."""
    told = f"{body['health']}, record {body['head']}, {body['folds']} folded, {body['queued']} waiting"
    if body["current"]:
        told += f", folding {body['current']['model']}"
    return "; ".join([told, *(f"{row['reason']}: {row['message']}" for row in body["degraded"])])
