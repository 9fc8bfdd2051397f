"""Log lines: for people on a terminal, JSON otherwise; on standard error, or in a file that may be rotated. One line
per thing that happened, with stable keys.

Nothing in a line can steer a terminal or pass for another line, wherever a name or message came from; and what goes
wrong again and again in the same way is said once, and then from time to time with a count.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import NamedTuple, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from continual.errors import Misconfigured
from continual.texts import plain

INTERVAL = 300.0
"""Seconds for which the same trouble of the same candidate is not logged again."""
_REMEMBERED = 1000
"""Different messages that are kept in mind."""
_TRACE = 20_000
"""Characters of a trace that are logged."""
_SAME = ("level", "event", "model", "what", "error", "message", "reason", "target")


def configure(*, json: bool | None = None, level: str = "info", file: Path | None = None) -> None:
    """Sets structlog up for this process, and has what libraries log come the same way. `file`: where lines go in place
    of standard error. `json` None means JSON where they go to no terminal. Raises Misconfigured for a file that cannot
    be written."""
    terminal = file is None and sys.stderr.isatty()
    out = sys.stderr if file is None else Appended(file)
    as_json = not terminal if json is None else json
    last: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
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
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", out)),  # a line and its end in one piece
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_Forward()], force=True)
    logging.getLogger("continual").setLevel(level.upper())  # the rooms below the service, which know no structlog


class Appended:
    """A log file: lines are appended, and where it was moved or removed, as a rotation does, the next one begins it
    anew. Where it cannot be written the line goes to standard error. A stream to structlog's logger, which writes a
    line at a time under a lock of its own."""

    def __init__(self, path: Path) -> None:
        """Raises Misconfigured where the file cannot be opened."""
        self._path = path
        self._fd = -1
        self._close = os.close  # at the end of the process no module has its names any more
        try:
            self._fd, self._at = self._open()
        except OSError as error:
            raise Misconfigured(f"log_file {path}: cannot be written ({error.strerror})") from None

    def write(self, text: str) -> int:
        """Appends a line."""
        data = text.encode(errors="backslashreplace")
        try:
            if self._moved():
                before = self._fd
                self._fd, self._at = self._open()
                os.close(before)
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            sys.stderr.write(data.decode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def __del__(self) -> None:
        if self._fd >= 0:  # it was open
            self._close(self._fd)

    def _open(self) -> tuple[int, tuple[int, int]]:
        """The descriptor, and which file it is. A pipe would hold up every thread that logs."""
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no file")
        return fd, (found.st_dev, found.st_ino)

    def _moved(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path)
            return (found.st_dev, found.st_ino) != self._at
        return True


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
