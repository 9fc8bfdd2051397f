"""What the page and the status say of a state of adapters: how full it is, what was cut off, its views, and what each
model has in what is out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from continual import api, making
from continual.cli import recorded
from continual.cli.status import text
from continual.config import Settings
from continual.service import publishing
from continual.service.metrics import Metrics
from continual.service.outgoing import outgoing
from continual.service.queue import Queue
from continual.service.status import Live
from continual.service.web import create_app
from tests.helpers import adapters, models

NAMES = ("alice", "<b>bob")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A layer has room for six triplets: each of two models of rank 4 keeps three."""
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state", making.Recipe(width=6, rule="mean"))
    wanted = {
        "state": tmp_path / "state",
        "max_base_ratio": 100.0,
        "current": tmp_path / "out/merged",
        "views": {
            "a": {"only": ["alice"], "as_lora": 2, "current": tmp_path / "out/a"},
            "gone": {"only": ["<i>nobody"], "repo": "org/gone"},
        },
    }
    with api.Merge(Settings.model_validate(wanted), write=True) as merge:
        for seed, name in enumerate(NAMES):
            merge.fold(adapters.lora(tmp_path / name, base, seed))
        yield Live(merge, Queue())


@pytest.fixture
def client(live: Live) -> TestClient:
    return TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1")


def test_what_was_cut_off_is_said_of_each_fold_and_of_all(
    client: TestClient, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    body = client.get("/api/status").json()
    bob, alice = body["last_folds"]
    assert alice["cut"] == 0.0
    assert 0.0 < alice["cut_now"] < 1.0
    assert bob["cut"] == pytest.approx(bob["cut_now"], rel=1e-5)
    squares = {fold["model"]: fold["tau_norm"] ** 2 for fold in body["last_folds"]}
    lost = sum(squares[fold["model"]] * fold["cut_now"] for fold in body["last_folds"])
    total = body["form"].pop("cut")
    assert total == pytest.approx(lost / sum(squares.values()))
    layers = sum(spec.name.endswith(("q_proj.weight", "down_proj.weight")) for spec in live.merge.state.format.tensors)
    assert body["form"] == {"kind": "adapters", "width": 6, "used": 6, "layers": layers}
    page = client.get("/").text
    assert f"<dt>cut off by now</dt><dd>{100 * total:.1f} %</dd>" in page
    assert "<dt>fullest layer</dt><dd>6 of 6</dd>" in page
    assert '<th scope="col">cut at fold</th><th scope="col">cut by now</th>' in page
    assert '<th scope="col">cosine</th><th scope="col">weight</th>' not in page, "which is not measured here"
    said = text(body | {"form": body["form"] | {"cut": total}})
    assert f"the fullest layer has 6; {100 * total:.1f} % of what they change was cut off" in said
    assert f"alice (cut 0.0 % when it came, {100 * alice['cut_now']:.1f} % by now)" in said
    recorded.many(client.get("/api/log").json())
    assert f"weight 1, cut {100 * bob['cut']:.1f} %" in capsys.readouterr().out
    live.merge.unfold(live.merge.look_unfold("alice"))
    assert client.get("/api/status").json()["form"]["used"] == 3, "what is gone makes room, and brings nothing back"


def test_what_each_model_has_is_said_of_the_record_that_is_out(client: TestClient, live: Live, tmp_path: Path) -> None:
    assert "continual explain</code> finds it" in client.get("/").text
    for name in (None, "a"):
        assert publishing.put(live.merge, outgoing(live.merge.settings, name), 2) is not None
    live.merge.fold(adapters.lora(tmp_path / "carol", tmp_path / "base", 7, modules=["k_proj"]))
    body = client.get("/api/status").json()
    merge, view = body["shares"]
    assert (merge["view"], merge["seq"], merge["count"]) == (None, 2, 2)
    assert (view["view"], view["seq"], [row["model"] for row in view["models"]]) == ("a", 2, ["alice"])
    explained = {one.name: one for one in live.merge.explain(at=2).models}
    for row in merge["models"]:
        found = explained[row["model"]]
        assert (row["norm"], row["cosine"]) == pytest.approx((found.norm, found.cosine))
    page = client.get("/").text
    assert f"Of record 2, which {tmp_path}/out/merged has" in page
    assert "&lt;b&gt;bob" in page
    assert '<meter aria-hidden="true" max="100" value="100.0"></meter>' in page, "alice is all of the view"
    assert "<i>nobody" not in page
    assert "Goes out as an adapter of rank 2, " in page
    assert "org/gone: nothing yet" in page
    said = text(body)
    assert "a: reads 1 by mean (alice), an adapter of rank 2, " in said
    assert "gone: only = <i>nobody: no model of the merge is called so" in said


def test_what_cannot_be_read_is_not_shown(client: TestClient, live: Live, tmp_path: Path) -> None:
    assert publishing.put(live.merge, outgoing(live.merge.settings), 2) is not None
    file = tmp_path / "out/merged/continual.json"
    told = json.loads(file.read_text())
    for rows in ("many", [1], [{"name": "alice", "weight": "much"}], {"name": "alice"}, None):
        file.write_text(json.dumps(told | {"shares": rows}))
        page = client.get("/")
        assert (page.status_code, "<meter" in page.text) == (200, False), rows
    live.merge.unfold(live.merge.look_unfold("alice"))
    generation = live.merge.state.ledger.head.generation
    for chunk in (live.merge.state.path / "generations" / str(generation)).glob("columns/*/c.*"):
        chunk.write_bytes(b"")
    body = client.get("/api/status").json()
    assert (body["form"]["width"], body["form"]["used"]) == (6, None)
    assert "<dt>width</dt><dd>6</dd>" in client.get("/").text
