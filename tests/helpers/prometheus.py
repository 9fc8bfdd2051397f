"""What answers as Prometheus does for one query, and the real one beside a gauge that can be set: helpers of the tests
of candidates."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from tests.helpers import services

RULES = """
groups:
  - name: service
    interval: 200ms
    rules:
      - alert: TooManyErrors
        expr: service_errors_ratio > 0.05
"""
FIRING = 'count(ALERTS{alertname="TooManyErrors",alertstate="firing"}) or vector(0)'
"""How many alarms there are: none is a value, too."""


@dataclass
class Told:
    """A server that gives `values` for every query; `body`, where it is set, in place of an answer, with `status`."""

    url: str
    values: list[float] = field(default_factory=list)
    body: Any = None
    status: int = 200
    asked: list[str] = field(default_factory=list)

    def answer(self) -> bytes:
        """What is sent."""
        if self.body is not None:
            return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        rows = [{"metric": {"n": str(n)}, "value": [1.5, str(value)]} for n, value in enumerate(self.values)]
        return json.dumps({"status": "success", "data": {"resultType": "vector", "result": rows}}).encode()


@contextmanager
def told() -> Iterator[Told]:
    """A server that runs as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            it.asked.append(form["query"][0])
            data = it.answer()
            self.send_response(it.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it = Told(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield it
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Scraped:
    """A real Prometheus at `url`, which knows a gauge, `service_errors_ratio`, and fires where it is above 0.05."""

    url: str = ""
    errors: float = 0.0

    def ask(self, query: str) -> list[float]:
        """The values of a query now; none before it has started."""
        return [float(row["value"][1]) for row in ask(self.url, query) or []]


@contextmanager
def scraped(place: Path) -> Iterator[Scraped]:
    """A real Prometheus, in the directory `place`, that runs as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = f"# TYPE service_errors_ratio gauge\nservice_errors_ratio {it.errors}\n".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Service(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a scrape that took too long

    it = Scraped()
    service = Service(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    (place / "rules.yml").write_text(RULES)
    (place / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}\nrule_files: [rules.yml]\n"
        "scrape_configs:\n  - job_name: service\n    static_configs:\n"
        f"      - targets: ['127.0.0.1:{service.server_address[1]}']\n"
    )
    with started(place) as it.url:
        try:
            services.until(lambda: it.ask("service_errors_ratio"), "Prometheus knows of the service")
            yield it
        finally:
            service.shutdown()
            thread.join()
            service.server_close()


@contextmanager
def started(place: Path) -> Iterator[str]:
    """A real Prometheus by the file prometheus.yml in the directory `place`, as long as the block; its address."""
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=series", "--web.listen-address=127.0.0.1:0"]
    log = place / "prometheus.log"
    with log.open("w") as file, subprocess.Popen(["prometheus", *flags], cwd=place, stderr=file) as server:
        try:
            listens = re.compile(r'"Listening on" address=(127\.0\.0\.1:[1-9]\d*)')
            yield "http://" + services.until(lambda: listens.search(log.read_text()), "Prometheus has a port")[1]
        finally:
            server.terminate()


def ask(url: str, query: str) -> list[dict[str, Any]] | None:
    """The rows of a query now; None where Prometheus has not started. Raises AssertionError for one that is wrong."""
    code, text = services.get(f"{url}/api/v1/query?query={quote(query, safe='')}")
    assert code in (200, 503), f"{query}: {text}"
    rows: list[dict[str, Any]] | None = json.loads(text)["data"]["result"] if code == 200 else None
    return rows
