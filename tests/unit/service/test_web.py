"""The service's answers, on a real state at rest: pages, JSON, probes, headers, and requests that make no sense."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from continual import api, gates, making
from continual.cli import recorded
from continual.cli.status import text
from continual.config import Settings
from continual.records import Event
from continual.service.metrics import Metrics
from continual.service.queue import Queue
from continual.service.status import Live
from continual.service.web import create_app
from continual.sources.folder import FolderSource
from tests.helpers import models


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        merge.fold(models.fine_tune(base, tmp_path / "<b>alice", 1))
        merge.fold(base)
        yield Live(merge, Queue())


@pytest.fixture
def client(live: Live) -> TestClient:
    return TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1")


def test_page_shows_what_happened_and_escapes_names(client: TestClient) -> None:
    page = client.get("/").text
    assert "&lt;b&gt;alice" in page
    assert "<b>alice" not in page
    assert "zero" in page, "the reason of the refusal"


def test_what_a_fold_left_out_is_on_the_page_in_the_status_and_in_the_log(
    tmp_path: Path, client: TestClient, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "left out" not in client.get("/").text

    def bring(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({f"<h>{number}.weight": torch.ones(2) for number in range(7)})

    live.merge.fold(models.fine_tune(tmp_path / "base", tmp_path / "bob", 2, change=bring))
    said = ", ".join(f"<h>{number}.weight" for number in range(5)) + " and 2 more"
    page = client.get("/").text
    assert '<th scope="col">left out</th>' in page
    assert html.escape(said) in page
    body = client.get("/api/status").json()
    assert [fold["left_out"] for fold in body["last_folds"]] == [said, ""]
    assert f"bob (left out: {said})" in text(body)
    recorded.many(client.get("/api/log").json())
    assert f"; left out: {said}" in capsys.readouterr().out


def test_what_gates_warned_of_is_on_the_page_in_the_status_and_in_the_log(
    tmp_path: Path, client: TestClient, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    assert '<th scope="col">warned</th>' not in client.get("/").text
    live.merge.engine.gates = gates.make(Settings(gates={"norms": {"act": "warn"}}))
    live.merge.fold(models.fine_tune(tmp_path / "base", tmp_path / "bob", 2, size=1.0))
    assert '<th scope="col">warned</th>' in client.get("/").text
    body = client.get("/api/status").json()
    assert [fold["warned"] for fold in body["last_folds"]] == ["norm-base", ""]
    assert "bob (warned: norm-base)" in text(body)
    records = client.get("/api/log").json()
    assert not any("sketch" in (record["numbers"] or {}) for record in records)
    recorded.many(records)
    assert "; warned: norm-base" in capsys.readouterr().out


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    for path in ("/", "/api/status", "/api/log", "/metrics", "/healthz", "/no-such-page"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store"), path


def test_a_strange_name_is_misdirected_and_an_allowed_one_is_not(live: Live) -> None:
    metrics = Metrics()
    app = create_app(live, metrics, names=["merge.example.org"])
    for path in ("/", "/api/status", "/metrics", "/healthz", "/webhook"):
        answer = TestClient(app, base_url="http://evil.example:8321").get(path)
        assert (answer.status_code, "allowed_hosts" in answer.text) == (421, True), path
        assert "x-content-type-options" in answer.headers
    assert b'continual_http_dropped_total{reason="host"} 5.0' in metrics.text()
    for name in ("merge.example.org", "10.0.0.7:80", "localhost"):
        assert TestClient(app, base_url=f"http://{name}").get("/healthz").status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("POST", "/", 405), ("GET", "/", 500)])
def test_what_cannot_be_answered_is_said_in_words_and_with_the_headers(
    live: Live, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int
) -> None:
    def gone() -> None:
        raise OSError("the <disk> is gone")

    if status == 500:
        monkeypatch.setattr(live, "status", gone)
    client = TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1", raise_server_exceptions=False)
    page = client.request(method, path)
    assert (page.status_code, page.headers.get_list("x-content-type-options")) == (status, ["nosniff"])
    assert f"<h1>{status}</h1>" in page.text
    assert 'href="/folds"' in page.text
    assert "<disk>" not in page.text
    told = client.request(method, "/api/status" if path == "/" else f"/api{path}")
    assert (told.status_code, list(told.json())) == (status, ["error"])
    assert "default-src 'none'" in told.headers["content-security-policy"]


def test_without_a_secret_there_is_no_webhook(client: TestClient) -> None:
    assert client.post("/webhook", json={}).status_code == 404


def test_log_pages_backwards(client: TestClient) -> None:
    everything = client.get("/api/log").json()
    body = everything["records"] if isinstance(everything, dict) else everything
    assert [r["kind"] for r in body] in (["init", "fold", "refuse"], ["refuse", "fold", "init"])
    one = client.get("/api/log", params={"limit": 1, "before": 2}).json()
    rows = one["records"] if isinstance(one, dict) else one
    assert [r["seq"] for r in rows] == [1]


@pytest.mark.parametrize("query", ["limit=x", "limit=0", "limit=1001", "before=-1", "before=1.5"])
def test_senseless_queries_are_400(client: TestClient, query: str) -> None:
    answer = client.get(f"/api/log?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_nothing_can_be_changed(client: TestClient) -> None:
    for path in ("/", "/api/status", "/api/log", "/metrics"):
        assert client.post(path).status_code == 405


def test_ready_only_once_every_source_has_scanned(client: TestClient, live: Live) -> None:
    assert client.get("/readyz").status_code == 503
    live.scanned = True
    assert client.get("/readyz").status_code == 200
    assert client.get("/healthz").status_code == 200


def test_degraded_is_shown_everywhere_and_stays_ready(client: TestClient, live: Live) -> None:
    live.scanned = True
    assert client.get("/readyz").text == "ok\n"
    live.health.room("/state", 1, 10**6)
    live.health.broke("<i>mallory", "RecursionError")
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.text.splitlines()[0] == "degraded"
    assert [line.partition(":")[0] for line in ready.text.splitlines()[1:]] == ["disk", "internal"]
    body = client.get("/api/status").json()
    assert body["health"] == "degraded"
    assert [row["reason"] for row in body["degraded"]] == ["disk", "internal"]
    assert "next fold needs 1 MB" in body["why"]
    page = client.get("/").text
    assert "degraded" in page
    assert "&lt;i&gt;mallory: RecursionError" in page
    told = text(body).splitlines()
    assert told[0].startswith("degraded, process")
    assert told[1].startswith("disk       /state: 1 B free")
    assert client.get("/healthz").text == "ok\n"


@pytest.mark.parametrize("degraded", [False, True])
def test_that_it_stops_is_shown_everywhere_whatever_else_is_wrong(
    client: TestClient, live: Live, *, degraded: bool
) -> None:
    live.begin_command("tag")
    assert "stops" not in live.line()
    live.ending = "stops on SIGTERM: what is under way has until 12:00:00Z to end"
    if degraded:
        live.health.room("/state", 1, 10**6)
    body = client.get("/api/status").json()
    assert body["health"] == "stopping"
    assert text(body).startswith(f"stopping: {live.ending}")
    assert live.ending in client.get("/").text
    assert live.line().endswith(live.ending)
    assert client.get("/healthz").text == "ok\n"


def test_every_waiting_candidate_shows_its_last_error_and_its_next_try(client: TestClient, live: Live) -> None:
    source = FolderSource(Path("/in"))
    for number, name in enumerate(("new", "b\x1b[2Jad", "caf\udce9")):
        live.queue.put(Event("folder", f"/in/{name}", (number, name)), source)
    new = live.queue.take(0.0)
    for _ in range(2):
        failed = live.queue.take(0.0)
        assert failed is not None
        failed.error = f"{failed.event.name}: \x1b]0;owned\x07 the disk"
        live.queue.again(failed, time.monotonic(), after=100.0)
    assert new is not None
    live.queue.put(new.event, source)
    answer = client.get("/api/status")
    assert answer.content.isascii()
    rows = answer.json()["queue"]
    assert [(row["model"], row["failures"]) for row in rows] == [("b\x1b[2Jad", 1), (r"caf\udce9", 1), ("new", 0)]
    assert (rows[2]["error"], rows[2]["next_try"]) == (None, None)
    wait = datetime.fromisoformat(rows[0]["next_try"]) - datetime.now(UTC)
    assert 95 < wait.total_seconds() < 101
    page = client.get("/").text
    assert r"b\x1b[2Jad: \x1b]0;owned\x07 the disk" in page
    assert r"caf\udce9" in page
    told = text(answer.json())
    assert r"failed     b\x1b[2Jad, 1 times: b\x1b[2Jad: \x1b]0;owned\x07 the disk; next try 20" in told
    assert "waiting    new\n" in told
    assert told.encode()


def test_a_fold_or_a_loop_that_stands_still_is_not_healthy(live: Live) -> None:
    now = [1000.0]
    live = Live(live.merge, Queue(), clock=lambda: now[0])
    client = TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1")

    def passes(seconds: float, *, beats: bool = True) -> tuple[int, str]:
        now[0] += seconds
        if beats:
            live.beat()
        answer = client.get("/healthz")
        return answer.status_code, answer.text.strip()

    assert passes(5000.0) == (200, "ok"), "nothing is under way"
    live.begin(Event("folder", "/in/alice"))
    assert passes(899.0) == (200, "ok")
    assert passes(2.0) == (503, "alice: no progress for 901 s")
    assert client.get("/api/status").json()["health"] == "stuck"
    live.progress("fold", 1, 2)
    assert passes(899.0) == (200, "ok"), "it goes on"
    live.end()
    assert passes(900.0) == (200, "ok"), "it is done"
    live.begin_round()
    assert passes(901.0) == (503, "a round over the pool: no progress for 901 s")
    live.end()
    assert passes(31.0, beats=False) == (503, "no heartbeat for 31 s")
    assert passes(0.0) == (200, "ok")
