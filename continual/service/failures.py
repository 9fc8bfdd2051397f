"""Exceptions that nobody expected: caught wherever the daemon works, told of once and whole, and counted, so that none
of them ends the service. What becomes of a candidate then is for the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import structlog

from continual.config import Settings
from continual.errors import ContinualError
from continual.service.health import Health
from continual.service.metrics import Metrics
from continual.service.tracing import Tracing
from continual.texts import plain

T = TypeVar("T")
TRIES = 3
"""So many times a candidate may raise such an exception before it is refused as `internal`."""
_SHOWN = 500


class Escaped(Exception):
    """What was raised is no Exception and would end the process: SystemExit of somebody's module, a panic of a library
    in Rust."""


class Failures:
    """Tells of such exceptions in the log, with their traces, in the metrics and in what health says."""

    def __init__(self, metrics: Metrics, health: Health, tracing: Tracing | None = None) -> None:
        """`tracing`: where the parts that do work send their spans; the default is nowhere."""
        self.metrics = metrics
        self.health = health
        self.news: Callable[[str, str], None] = lambda _event, _text: None
        """Hears what people may want to be told: a word of `config.notify.Happening`, and a sentence."""
        self.tracing = tracing or Tracing(Settings())
        self._log = structlog.get_logger("continual")

    def tell(self, error: BaseException, kind: str = "internal", **what: str) -> None:
        """Logs and counts an exception as `kind`; `what` says where it was raised (`model`, or `what`)."""
        self.metrics.error(kind)
        self.health.broke(", ".join(what.values()), told(error))
        self._log.error("internal error", kind=kind, **what, error=told(error), exc_info=error)


def told(error: BaseException) -> str:
    """An exception in one line."""
    try:
        text = str(error)
    except Exception:  # whatever it is made of
        text = "it cannot be shown"
    kind = type(error).__name__
    return plain(text if isinstance(error, ContinualError) else f"{kind}: {text}" if text else kind, _SHOWN)


def refusal(name: str, error: BaseException) -> str:
    """What the record of a candidate says that was refused as `internal`."""
    return (
        f"{plain(name)}: {told(error)}: raised {TRIES} times while it was looked at, and nobody expected it: a bug of "
        f"continual or of its environment; the log has the trace. Once that is mended: continual retry {plain(name)}"
    )


def contained(call: Callable[[], T]) -> Callable[[], T]:
    """`call` for another thread: whatever it raises is an Exception that a future can carry. Raises what `call` raises,
    and Escaped for all else."""

    def run() -> T:
        try:
            return call()
        except StopIteration as error:  # no future takes it
            raise Escaped("StopIteration") from error
        except Exception:
            raise
        except BaseException as error:
            raise Escaped(f"{type(error).__name__}: {error}") from error

    return run
