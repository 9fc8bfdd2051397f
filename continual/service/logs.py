"""Log lines: for people on a terminal, JSON otherwise, both on standard error. One line per thing that happened, with
stable keys.

Nothing in a line can steer a terminal or pass for another line, wherever a name or message came from; and what goes
wrong again and again in the same way is said once, and then from time to time with a count.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from continual.texts import plain

INTERVAL = 300.0
"""Seconds for which the same trouble of the same candidate is not logged again."""
_REMEMBERED = 1000
"""Different messages that are kept in mind."""
_TRACE = 20_000
"""Characters of a trace that are logged."""
_SAME = ("level", "event", "model", "what", "error", "message", "reason", "target")


def configure(*, json: bool | None = None, level: str = "info") -> None:
    """Sets structlog up for this process, and has what libraries log come the same way. `json` None means JSON where
    standard error is no terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    last: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            Repeats(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            harmless,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_Forward()], force=True)
    logging.getLogger("continual").setLevel(level.upper())  # the rooms below the service, which know no structlog


def harmless(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Shows control characters and their like in every value as escapes. A trace keeps its line ends: JSON writes them
    as `\\n`, and on a terminal its lines are indented by what they are."""
    return {key: _plain(value, lines=key == "exception") for key, value in line.items()}


def _plain(value: object, *, lines: bool = False) -> object:
    if isinstance(value, str):
        return plain(value, _TRACE, lines=True) if lines else plain(value)
    if isinstance(value, MutableMapping):
        return {plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else plain(str(value))


class Logged(NamedTuple):
    """When a message was logged last, and how often it was left out since."""

    at: float
    left_out: int


class Repeats:
    """Leaves out a line about trouble that says what one said less than INTERVAL seconds ago, of the same candidate;
    the next one that is logged says in `left_out` how many there were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds that never go back."""
        self._clock = clock
        self._told: OrderedDict[tuple[str, ...], Logged] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, _logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        """Passes `line` on, or raises DropEvent."""
        if line.get("level") not in ("warning", "error", "critical"):
            return line
        same = tuple(str(line.get(key, ""))[:_TRACE] for key in _SAME)
        now = self._clock()
        with self._lock:  # every thread logs
            before = self._told.get(same)
            if before is not None and now - before.at < INTERVAL:
                self._told[same] = before._replace(left_out=before.left_out + 1)
                raise structlog.DropEvent
            self._told[same] = Logged(now, 0)
            self._told.move_to_end(same)
            if len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)
        return line if before is None or not before.left_out else {**line, "left_out": before.left_out}


class _Forward(logging.Handler):
    """Hands what the rooms below the service and libraries log to structlog, so that it is made harmless and is not
    repeated without end either."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        log = structlog.get_logger("continual")
        if record.name.partition(".")[0] == "continual":
            log.log(record.levelno, message, exc_info=record.exc_info)
            return
        say = log.error if record.levelno >= logging.ERROR else log.warning
        say("library", name=record.name, message=message, exc_info=record.exc_info)
