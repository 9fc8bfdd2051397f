"""What page, API, status and metrics show of a cluster. There is none here: who shows it must ask it nothing."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from continual import api, making
from continual.cli.status import text
from continual.config import Settings
from continual.config.cluster import RaySettings
from continual.executors.cluster_figures import NodeSeen, RayFigures
from continual.service import gauging, showing_cluster
from continual.service.failures import Failures
from continual.service.metrics import Metrics
from continual.service.queue import Queue
from continual.service.status import Live, at_rest
from continual.service.web import create_app
from continual.service.web.view import ShownCluster
from tests.helpers import models

GB = 1_000_000_000
BEGUN = 1_795_000_000.0
HOSTILE = "<b>layer\u202e"


class Clock:
    def __init__(self) -> None:
        self.now = BEGUN

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster")
    making.init(models.base(path / "base"), path / "state")
    return path / "state"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(state: Path, clock: Clock) -> Iterator[Live]:
    settings = Settings(state=state, executor="ray", ray=RaySettings(address="10.0.0.1:6379"))
    with api.Merge(settings) as merge:
        live = Live(merge, Queue())
        live.figures = RayFigures(clock)
        yield live


@pytest.fixture
def client(live: Live) -> TestClient:
    return TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1")


def block(client: TestClient) -> str:
    """The text of the part of the front page about the cluster."""
    found = re.search(r'<section data-live="cluster".*?</section>', client.get("/").text)
    return re.sub(r"<[^>]*>", " ", found[0]) if found else ""


def some_work(figures: RayFigures, clock: Clock) -> None:
    """Two machines are alive, one is gone; three orders were done, one was lost."""
    nodes = {f"10.0.0.{n}": NodeSeen(True, 8.0, 32 * GB, 1.0) for n in (2, 10)}
    with figures.driving(3) as driven:
        for first, machine in (("a", "10.0.0.2"), ("b", "10.0.0.3"), (HOSTILE, "10.0.0.2")):
            clock.now += 60.0
            driven.sent(first, 1)
            driven.came(first, machine, 2 * GB, 90.0)
    with figures.driving(1) as driven:
        driven.sent("a", 1)
        driven.was_lost("a")
    figures.answered("10.0.0.1:6379", {**nodes, "10.0.0.3": NodeSeen(alive=False)})


def test_a_daemon_that_works_alone_shows_no_cluster(state: Path) -> None:
    with api.Merge(Settings(state=state)) as merge:
        live = Live(merge, Queue())
        some_work(live.figures, Clock())
        client = TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1")
        assert block(client) == ""
        body = client.get("/api/status").json()
        assert body["cluster"] is None
        assert not [line for line in text(body).splitlines() if line.startswith(("cluster", "orders", "machine"))]
        assert b"_ray_" not in looked(live).text()
    assert at_rest(Settings(state=state, executor="ray"))["cluster"] is None
    assert "cluster  " not in text({**body, "cluster": None, "pid": None})


def looked(live: Live, metrics: Metrics | None = None) -> Metrics:
    """What one look at what is measured beside the folds gives."""
    metrics = metrics or Metrics()
    gauging.begin(metrics, live.merge)
    metrics.source({"continual_disk_free_bytes": None})

    async def run() -> None:
        task = asyncio.create_task(gauging.measure(live.merge, live, Failures(metrics, live.health)))
        while metrics.registry.get_sample_value("continual_disk_free_bytes") is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run())  # its end waits for the thread that looks
    return metrics


def test_before_there_was_work_it_is_said_that_the_cluster_was_not_asked(client: TestClient) -> None:
    assert "At 10.0.0.1:6379." in block(client)
    assert "asked when there is work" in block(client)
    assert "machines alive" not in block(client)
    body = client.get("/api/status").json()
    assert "cluster    10.0.0.1:6379: which machines it has is asked when there is work for it" in text(body)
    assert "orders     0 done by this process, 0 lost" in text(body)


def test_machines_and_what_each_did_are_on_the_page_in_the_api_and_in_the_status(
    client: TestClient, live: Live, clock: Clock
) -> None:
    some_work(live.figures, clock)
    body = client.get("/api/status").json()
    shown = TypeAdapter(ShownCluster).validate_python(body["cluster"])
    assert [one.address for one in shown.nodes] == ["10.0.0.2", "10.0.0.3", "10.0.0.10"]
    assert (shown.alive, shown.cores, shown.memory_bytes, shown.gpus) == (2, 16.0, 64 * GB, 2.0)
    assert (shown.work.orders, shown.work.read_bytes, shown.work.seconds, shown.lost) == (3, 6 * GB, 270.0, 1)
    first, gone, idle = shown.nodes
    assert (first.alive, first.work.orders, first.heard, first.last) == (True, 2, "2026-11-18T11:09:40Z", HOSTILE)
    assert (gone.alive, gone.cores, gone.work.orders) == (False, 0.0, 1)
    assert (idle.alive, idle.work.orders, idle.heard, idle.last) == (True, 0, None, None)
    lines = text(body).splitlines()
    for line in (
        "cluster    10.0.0.1:6379, 2 machines alive: 16 cores, 64 GB and 2 GPUs for orders, as of 2026-11-18T11:09:40Z",
        "orders     3 done by this process, 1 lost",
        "machine    10.0.0.2, 8 cores: 2 orders, 4 GB read in 3 min 0 s; last heard of 2026-11-18T11:09:40Z with "
        r"<b>layer\u202e",
        "machine    10.0.0.3, gone: 1 order, 2 GB read in 1 min 30 s; last heard of 2026-11-18T11:08:40Z with b",
        "machine    10.0.0.10, 8 cores: no order yet",
    ):
        assert line in lines
    told = block(client)
    for words in ("machines alive  2", "orders done  3", "orders lost  1", "No order is out.", "10.0.0.3  gone"):
        assert words in told
    assert html.escape(r"<b>layer\u202e") in told


def test_orders_under_way_are_shown_while_they_are(client: TestClient, live: Live, clock: Clock) -> None:
    some_work(live.figures, clock)
    before = live.stamp()
    live.begin_round()
    with live.figures.driving(40) as driven:
        for number in range(20):
            driven.sent(f"layer.{number}", 3 if number == 0 else 1)
        clock.now += 30.0
        driven.began("layer.0", "10.0.0.2")
        clock.now -= 30.0
        driven.was_lost("layer.1")
        driven.sent("layer.1", 1)
        driven.came("layer.5", "10.0.0.2", 1, 1.0)
        assert live.stamp() != before
        body = client.get("/api/status").json()
        found = body["cluster"]
        assert (found["done"], found["total"], found["out"], len(found["orders"])) == (1, 40, 19, 12)
        assert found["orders"][0] == {
            "tensor": "layer.0",
            "tensors": 3,
            "since": "2026-11-18T11:09:40Z",
            "lost": 0,
            "machine": "10.0.0.2",
            "began": "2026-11-18T11:10:10Z",
        }
        assert found["orders"][1]["machine"] is None
        assert [(one["working"], one["on"]) for one in found["nodes"]] == [(1, "layer.0"), (0, None), (0, None)]
        lines = text(body).splitlines()
        assert "orders     1 of 40 done, 19 out; 4 done by this process, 2 lost" in lines
        out = "out        layer.0 and 2 more, since 2026-11-18T11:09:40Z, on 10.0.0.2 since 2026-11-18T11:10:10Z"
        assert out in lines
        assert "layer.0  3  2026-11-18T11:09:40Z  10.0.0.2  2026-11-18T11:10:10Z" in re.sub(" +", "  ", block(client))
        assert "Now: 1 of 40 orders done, 19 out, 20 still to be sent." in block(client)
        assert "and 7 more" in block(client)
    assert "No order is out." in block(client)


def test_a_machine_that_is_avoided_is_told_of_everywhere(client: TestClient, live: Live, clock: Clock) -> None:
    some_work(live.figures, clock)
    address = "10.0.0.1:6379"
    nodes = {f"10.0.0.{n}": NodeSeen(True, 8.0, ids=(f"id{n}",)) for n in (2, 10)}
    live.figures.answered(address, nodes)
    why = f"OSError: No space left on device: '{HOSTILE}'"
    live.figures.avoided.avoid(address, "10.0.0.10", ["id10"], why)
    with live.figures.driving(1) as driven:
        driven.sent("x", 1)
        driven.failed("x")
    body = client.get("/api/status").json()
    escaped = why.replace(HOSTILE, r"<b>layer\u202e")
    assert f"avoided    10.0.0.10 until 2026-11-18T11:14:40Z: {escaped}" in text(body).splitlines()
    assert "orders     3 done by this process, 1 lost, 1 that a machine could not do" in text(body).splitlines()
    told = html.unescape(block(client))
    assert f"The machine 10.0.0.10 gets no orders until 2026-11-18T11:14:40Z: {escaped}" in told
    assert "10.0.0.10  avoided  8" in told
    assert "10.0.0.2  alive  8" in told
    shown = looked(live).text()
    assert b"continual_ray_avoided_nodes 1.0" in shown
    assert b"continual_ray_failed_total 1.0" in shown
    clock.now += 300.0
    assert client.get("/api/status").json()["cluster"]["avoided"] == []
    assert b"continual_ray_avoided_nodes 0.0" in looked(live).text()


def test_an_open_page_hears_every_two_seconds_of_orders_that_are_out(live: Live, clock: Clock) -> None:
    clock.now -= clock.now % 60.0
    live = Live(live.merge, Queue(), clock=clock)
    live.figures = RayFigures(clock)
    idle = live.stamp()
    clock.now += 4.0
    assert live.stamp() == idle
    with live.figures.driving(1):
        before = live.stamp()
        clock.now += 2.0
        assert live.stamp() != before


def test_an_order_that_was_lost_before_says_so(live: Live) -> None:
    with live.figures.driving(1) as driven:
        for _ in range(2):
            driven.sent("x", 1)
            driven.was_lost("x")
        driven.sent("x", 1)
        lines = text(live.status().body()).splitlines()
    assert "out        x, since 2026-11-18T11:06:40Z, lost 2 times before" in lines


def test_a_cluster_that_does_not_answer_is_told_of_everywhere(client: TestClient, live: Live, clock: Clock) -> None:
    some_work(live.figures, clock)
    clock.now += 3600.0
    looked(live)
    assert live.shortfalls() == [], "nothing was asked of it for an hour"
    with live.figures.driving(2) as driven:
        driven.sent("x", 1)
        clock.now += 30.0
        looked(live)
        assert live.shortfalls() == []
        clock.now += 1.0
        looked(live)
        said = "has not answered since 2026-11-18T11:09:40Z, and there is work for it"
        assert [(one.reason, one.message) for one in live.shortfalls()] == [
            ("cluster", f"ray.address: 10.0.0.1:6379 {said}")
        ]
        assert f"The cluster {said}." in block(client)
        assert f"cluster    {said}" in text(client.get("/api/status").json())
        live.figures.answered("10.0.0.1:6379", {})
        assert b"continual_ray_nodes 0.0" in looked(live).text()
        assert live.shortfalls() == []


def test_a_cluster_whose_driver_has_ended_is_told_of_until_there_is_another(
    client: TestClient, live: Live, clock: Clock
) -> None:
    some_work(live.figures, clock)
    live.figures.parted("10.0.0.1:6379")
    assert b"continual_ray_nodes 0.0" in looked(live).text()
    said = "is not connected since 2026-11-18T11:09:40Z: the next work connects anew"
    assert [one.message for one in live.shortfalls()] == [f"ray.address: 10.0.0.1:6379 {said}"]
    assert f"The cluster {said}." in block(client)
    assert "10.0.0.2  not known" in block(client)
    assert "machines alive" not in block(client)
    lines = text(client.get("/api/status").json()).splitlines()
    assert f"cluster    {said}" in lines
    assert "machine    10.0.0.10, not known whether it is alive: no order yet" in lines
    assert "machine    10.0.0.3, gone: 1 order" in "\n".join(lines)
    live.figures.answered("10.0.0.1:6379", {"10.0.0.2": NodeSeen(alive=True)})
    assert b"continual_ray_nodes 1.0" in looked(live).text()
    assert (live.shortfalls(), client.get("/api/status").json()["cluster"]["problem"]) == ([], "")


@pytest.mark.parametrize("other", [{"ray": RaySettings(address="10.9.9.9:6379")}, {"executor": "local"}], ids=str)
def test_settings_that_name_another_cluster_or_none_end_what_was_wrong_with_it(
    live: Live, clock: Clock, monkeypatch: pytest.MonkeyPatch, other: dict[str, object]
) -> None:
    some_work(live.figures, clock)
    live.figures.parted("10.0.0.1:6379")
    assert [one.reason for one in live.shortfalls()] == []
    metrics = looked(live)
    assert b"continual_ray_nodes 0.0" in metrics.text()
    assert [one.reason for one in live.shortfalls()] == ["cluster"]
    monkeypatch.setattr(live.merge, "settings", live.merge.settings.model_copy(update=other))
    assert b"continual_ray_nodes" not in looked(live, metrics).text()
    assert live.shortfalls() == []


def test_where_there_are_many_machines_some_are_shown_and_all_are_counted(client: TestClient, live: Live) -> None:
    figures = live.figures
    names = [f"10.0.{n}.1" for n in range(400)]
    with figures.driving(len(names)) as driven:
        for name in names:
            driven.sent("t", 1)
            driven.came("t", name, 1, float(name.split(".")[2]))
    nodes = {name: NodeSeen(name == "10.0.77.1") for name in names} | {"idle": NodeSeen(True, 1.0)}
    figures.answered("head", nodes)
    found = showing_cluster.shown("head", figures.seen("head"), 0.0)
    assert len(found.nodes) == showing_cluster.NODES
    assert {"10.0.399.1", "idle"} <= {one.address for one in found.nodes}
    assert sum(one.work.orders for one in found.nodes) + found.others.orders == found.work.orders == 400
    assert "others  " in block(client)
    live.figures.answered("10.0.0.1:6379", nodes)
    told = [line for line in text(live.status().body()).splitlines() if line.startswith("machine")]
    assert told[0] == "machine    idle, 1 core: no order yet"
    assert (len(told), told[-1]) == (13, "machine    and 38 more: the page shows them, and --json")


def test_the_description_of_the_api_has_the_cluster(client: TestClient) -> None:
    schemas = client.get("/api/openapi.json").json()["components"]["schemas"]
    assert {"nodes", "orders", "lost", "out", "answered"} <= schemas["ShownCluster"]["properties"].keys()
    assert schemas["ShownNode"]["properties"]["work"] == {"$ref": "#/components/schemas/ShownWork"}
