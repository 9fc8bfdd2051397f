"""Log lines: for people on a terminal, JSON otherwise, both on standard error. One line per thing that happened, with
stable keys."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor


def configure(*, json: bool | None = None, level: str = "info") -> None:
    """Sets structlog up for this process. `json` None means JSON where standard error is no terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    last: Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    lower = logging.getLogger("continual")  # the rooms below the service, which know nothing of structlog
    lower.handlers = [_Passed()]
    lower.propagate = False


class _Passed(logging.Handler):
    """Passes on what a room below the service logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line more."""
        structlog.get_logger("continual").log(record.levelno, record.getMessage())
