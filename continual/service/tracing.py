"""Where the time of folds, exports, releases and hooks goes, as spans of OpenTelemetry for who asks for them. Without
the setting `otlp` nothing of it is loaded, and nothing is measured.

A fold has one span for each stage of its clock, from the first moment of the stage to its last over all threads; what
went into it is in `continual.busy_seconds`, `continual.cpu_seconds` and `continual.bytes`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol
from urllib.parse import urlsplit

from continual.config import Settings
from continual.errors import Misconfigured
from continual.publish.plain_http import is_loopback
from continual.state.software import software
from continual.timing.clock import Profile, profiled

Value = str | int | float | bool
_LAST = 5000
"""Milliseconds for which a service that ends tries to send what is left."""


class OpenSpan(Protocol):
    """A span that runs."""

    def set_attribute(self, key: str, value: Value) -> object:
        """Notes something about it."""
        ...


class _Nowhere:
    """A span that nobody sees."""

    def set_attribute(self, key: str, value: Value) -> object:
        """Notes nothing."""


def check(settings: Settings) -> None:
    """Raises Misconfigured for an address that cannot be used, and where the SDK is not installed."""
    if settings.otlp is None:
        return
    parts = urlsplit(settings.otlp)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise Misconfigured("otlp has to be http:// or https://, a host and a port, without credentials or a query")
    if not _installed():
        raise Misconfigured("otlp is set and OpenTelemetry is not installed: pip install 'continual[otel]'")


def _installed() -> bool:
    """Whether the SDK and the exporter are there; other packages bring the interface alone."""
    try:
        return all(find_spec(name) for name in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"))
    except ModuleNotFoundError:
        return False


class Tracing:
    """Sends spans where the settings say. From any thread."""

    def __init__(self, settings: Settings) -> None:
        """Raises Misconfigured, as `check`."""
        check(settings)
        self._provider = None
        if settings.otlp is None:
            return
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        session = requests.Session()
        session.trust_env = not is_loopback(urlsplit(settings.otlp).hostname or "")  # no proxy for this machine itself
        said = {"service.name": "continual", "service.version": software()["continual"]}
        self._provider = TracerProvider(resource=Resource.create(said), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(settings.otlp.rstrip("/") + "/v1/traces", session=session)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("continual")

    @contextlib.contextmanager
    def span(self, name: str, **attributes: Value | None) -> Iterator[OpenSpan]:
        """A span as long as the block, with what is known from the start. Notes what the block raises, and raises
        it."""
        if self._provider is None:
            yield _Nowhere()
            return
        known = {f"continual.{key}": value for key, value in attributes.items() if value is not None}
        with self._tracer.start_as_current_span(name, attributes=known) as span:
            yield span

    @contextlib.contextmanager
    def staged(self, name: str, **attributes: Value | None) -> Iterator[OpenSpan]:
        """As `span`, with a span for each stage of the work within. On the thread that does the work, or hands it
        out."""
        if self._provider is None:
            yield _Nowhere()
            return
        with self.span(name, **attributes) as span:
            shift = time.time_ns() - time.perf_counter_ns()
            with contextlib.ExitStack() as stack:
                stack.callback(lambda: self._stages(profile, shift))
                profile = stack.enter_context(profiled())
                yield span

    def _stages(self, profile: Profile, shift: int) -> None:
        """Makes the spans of the stages that took any time; `shift`: from the clock of the profile to nanoseconds since
        1970."""
        for stage, spent in profile.stages.items():
            if spent.last > 0.0:
                span = self._tracer.start_span(stage, start_time=shift + int(spent.first * 1e9))
                span.set_attribute("continual.busy_seconds", spent.seconds)
                span.set_attribute("continual.cpu_seconds", spent.cpu_seconds)
                span.set_attribute("continual.bytes", spent.nbytes)
                span.end(shift + int(spent.last * 1e9))

    def end(self) -> None:
        """Sends what is left, and waits a while for it."""
        if self._provider is not None:
            self._provider.force_flush(_LAST)
