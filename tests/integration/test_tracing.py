"""Spans of a daemon, as a receiver of OTLP over HTTP gets them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from continual import Settings, making
from continual.errors import Misconfigured
from continual.service import tracing
from continual.service.tracing import Tracing
from continual.timing.clock import stage
from tests.helpers import models, services
from tests.helpers.hooks import serving_hooks

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the OTLP exporter is not installed")


@contextmanager
def receiving() -> Iterator[tuple[str, list[Any]]]:
    """A receiver on loopback: its address, and the spans that came."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def noted(span: Any) -> dict[str, Any]:
    """The attributes of a span."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def test_stages_are_spans_within_the_work_and_an_error_is_noted() -> None:
    with receiving() as (address, spans):
        told = Tracing(Settings(otlp=address))
        with pytest.raises(ZeroDivisionError), told.staged("fold", model="alice", view=None), stage("read", 7):
            _ = 1 // 0
        told.end()
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"fold", "read", "other"}
    fold, read = by_name["fold"], by_name["read"]
    assert (noted(fold), fold.status.code) == ({"continual.model": "alice"}, 2)
    assert read.parent_span_id == fold.span_id
    assert fold.start_time_unix_nano <= read.start_time_unix_nano <= read.end_time_unix_nano <= fold.end_time_unix_nano
    assert noted(read)["continual.bytes"] == 7
    assert noted(read)["continual.busy_seconds"] >= 0.0


def test_without_the_setting_nothing_is_measured() -> None:
    told = Tracing(Settings())
    with told.staged("fold"), told.span("hook") as span, stage("read") as watch:
        span.set_attribute("continual.ok", True)
    assert watch is None
    told.end()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:4318", "ftp://host", "http://", "http://me:s3cret@host", "http://h?k=s3cret"]
)
def test_an_address_that_cannot_be_used_is_refused_and_not_quoted(address: str) -> None:
    with pytest.raises(Misconfigured, match="otlp has to be") as refused:
        tracing.check(Settings(otlp=address))
    assert "s3cret" not in str(refused.value)


def test_the_interface_without_the_exporter_is_said_to_be_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:  # as find_spec does where a package above is not there
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tracing, "find_spec", absent)
    with pytest.raises(Misconfigured, match=r"pip install 'continual\[otel\]'"):
        tracing.check(Settings(otlp="http://127.0.0.1:4318"))


@pytest.mark.slow
def test_a_daemon_sends_spans_of_a_fold_an_export_and_a_hook(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    models.fine_tune(base, tmp_path / "in/alice", 1)
    file = tmp_path / "continual.toml"
    with receiving() as (address, spans), serving_hooks() as served:
        file.write_text(
            f'otlp = "{address}"\ncurrent = "{tmp_path}/current"\n[[hooks]]\nkind = "http"\nurl = "{served.url}"\n'
        )
        with services.daemon(tmp_path / "state", tmp_path / "in", "--config", str(file)) as process:
            services.url(process, tmp_path / "state")
            services.until(lambda: served.asked, "the hook is called")
            services.until(lambda: '"event": "hook"' in (tmp_path / "daemon.log").read_text(), "it is recorded")
            process.terminate()
            assert process.wait(30) == 0
    (fold,) = (span for span in spans if span.name == "fold")
    assert noted(fold) == {"continual.model": "alice", "continual.fate": "folded", "continual.seq": 1}
    stages = {span.name for span in spans if span.parent_span_id == fold.span_id}
    assert {"open", "gates", "read", "hash", "compute", "write", "commit"} <= stages
    exports = [span for span in spans if span.name == "export"]
    assert noted(exports[0])["continual.seq"] == 1
    (hook,) = (span for span in spans if span.name == "hook")
    assert noted(hook) == {"continual.kind": "http", "continual.seq": 1, "continual.ok": True}
