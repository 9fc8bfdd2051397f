"""The pages about the past, on a real state: folds, models, refusals, what can be done; names of strangers; and that
each page says what the API says."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from urllib.parse import unquote

import pytest
from pydantic import TypeAdapter
from starlette.routing import Route
from starlette.testclient import TestClient

from continual import api, making
from continual.config import Settings
from continual.service.metrics import Metrics
from continual.service.queue import Queue
from continual.service.status import Live
from continual.service.web import create_app
from continual.service.web.looking import PageLook
from continual.service.web.machines import Machines
from continual.service.web.pages import pictures
from continual.service.web.recalled import LayerColumn, LayerPicture
from tests.helpers import command, models

HOSTILE = ("<script>alert(1)<!--", "a\"onload='x", "\u202egnp.exe\u2066", "caf\udce9", "n" * 200, "-- rm; $(x) `y`")

BUSY = 5
"""What a command ends with where another process writes to the state."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Three folds in force, one taken out, one undone by going back, and a refusal."""
    path = tmp_path_factory.mktemp("past")
    base = models.base(path / "base")
    making.init(base, path / "state", making.Recipe(rule="mean"))
    with api.Merge(Settings(state=path / "state", keep=9, promote_token="hush"), write=True) as merge:
        for seed, name in enumerate(("alice", *HOSTILE[:2], "bob")):
            merge.fold(models.fine_tune(base, path / name, seed))
        merge.state.rollback(3)
        merge.fold(models.fine_tune(base, path / HOSTILE[2], 7))
        merge.unfold(merge.look_unfold("alice"))
        merge.fold(base)
        for seed, name in enumerate(HOSTILE[3:], 10):
            merge.fold(models.fine_tune(base, path / name, seed, size=9.0))
        yield Live(merge, Queue())


@pytest.fixture(scope="module")
def client(live: Live) -> TestClient:
    return TestClient(create_app(live, Metrics()), base_url="http://127.0.0.1")


def crawled(client: TestClient) -> dict[str, str]:
    """Every page that a link leads to, by its address."""
    found: dict[str, str] = {}
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        if path in found or path.startswith("#"):
            continue
        answer = client.get(path)
        assert answer.status_code == 200, path
        found[path] = answer.text
        if answer.headers["content-type"].startswith("text/html"):
            waiting += map(html.unescape, re.findall(r'(?:href|src)="([^"]*)"', answer.text))
    return found


def test_every_link_leads_somewhere_and_no_name_is_more_than_a_name(client: TestClient) -> None:
    pages = crawled(client)
    assert {"/", "/folds", "/folds/1", "/refusals", "/storage", "/settings", "/page.css", "/page.js"} <= set(pages)
    assert sum(path.startswith("/models/") for path in pages) == 9
    for path, text in pages.items():
        if path.startswith(("/api", "/metrics", "/page")):
            continue
        assert not {"\u202e", "\u2066"} & set(text), path
        assert "<script>" not in text, path
        assert not re.search(r"\son\w+=", re.sub(r'"[^"]*"', "", text)), f"{path}: an attribute that runs something"
        assert 'style="' not in text, f"{path}: the policy allows no style in the page"
    everything = " ".join(pages.values())
    assert r"caf\udce9" in everything
    assert r"\u202egnp.exe\u2066" in everything


def test_a_fold_is_told_in_words_with_its_share_of_today(client: TestClient, live: Live) -> None:
    page = client.get("/folds/2").text
    told = client.get("/api/folds/2").json()
    assert told["fold"]["fate"] == "in the merge"
    assert told["length_share"] == pytest.approx(
        told["fold"]["shown"]["tau_norm"] / live.merge.state.ledger.totals.norm_sum
    )
    assert 0.3 < told["length_share"] < 0.36, "one of three"
    assert f"{100 * told['length_share']:.1f} % of the lengths of all task vectors" in page
    assert "of the length of the base&#x27;s weights" in page
    assert "It changed 11 tensors." in page
    norm = told["fold"]["shown"]["tau_norm"]
    assert sum(group["norm"] ** 2 for group in told["groups"]) == pytest.approx(norm**2, rel=1e-4)
    assert [group["name"] for group in told["groups"]] == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    ("seq", "fate"),
    [(1, "taken out in record 7"), (2, "in the merge"), (4, "undone by going back"), (6, "in the merge")],
)
def test_what_became_of_each_fold_is_said(client: TestClient, seq: int, fate: str) -> None:
    assert client.get(f"/api/folds/{seq}").json()["fold"]["fate"] == fate
    assert fate in client.get(f"/folds/{seq}").text
    rows = {row["shown"]["seq"]: row["fate"] for row in client.get("/api/folds").json()["rows"]}
    assert rows[seq] == fate
    assert fate in client.get("/folds").text


def test_a_refused_model_has_a_page_that_says_why_and_what_to_do(client: TestClient, live: Live) -> None:
    row = next(row for row in client.get("/api/refusals").json()["rows"] if row["reason"] == "zero")
    assert row["now"] == "kept out"
    page = client.get(f"/models/{row['model_id']}").text
    assert html.escape(row["message"]) in page
    assert f"continual retry {row['seq']} --state {live.directory}" in page
    assert f"continual quarantine accept {row['seq']} --because WHY" in page
    told = client.get(f"/api/models/{row['model_id']}").json()
    assert (told["fate"], told["settled"], told["records"][0]["seq"]) == ("refused", row["seq"], row["seq"])


def test_every_command_on_the_pages_is_one_that_continual_understands(client: TestClient, live: Live) -> None:
    """They are run beside the open state: those that read do it, those that write say that it is open."""
    lines = {
        html.unescape(line)
        for path, text in crawled(client).items()
        if path.startswith(("/folds/2", "/folds/4", "/models", "/refusals", "/storage"))
        for line in re.findall(r'<code class="command">(.*?)</code>', text)
    }
    shapes = {re.sub(r"\b\d+\b", "N", line): line for line in lines}
    assert len(shapes) > 12
    for line in shapes.values():
        words = shlex.split(line)
        assert words.pop(0) == "continual"
        assert words[-2:] == ["--state", live.directory]
        words = [{"NAME": "kept", "RECORD": "2", "WHY": "it is good"}.get(word, word) for word in words]
        done = command.run(*words)
        assert done.returncode in (0, BUSY), (line, done)


def test_a_page_without_javascript_is_not_loaded_again_while_somebody_types(client: TestClient) -> None:
    reloads = {path: "<noscript><meta http-equiv=" in text for path, text in crawled(client).items()}
    typed = {path for path, text in crawled(client).items() if "<form" in text}
    assert "/folds" in typed
    assert reloads["/storage"]
    assert not any(reloads[path] for path in typed)


def test_lists_are_searched_and_paged_to_the_end(client: TestClient) -> None:
    seen: list[int] = []
    before = ""
    while True:
        found = client.get(f"/api/folds?limit=2{before}").json()
        seen += [row["shown"]["seq"] for row in found["rows"]]
        assert found["count"] == 5
        if found["before"] is None:
            break
        before = f"&before={found['before']}"
    assert seen == [6, 4, 3, 2, 1]
    found = client.get("/api/folds?q=ALI").json()
    assert [row["shown"]["model"] for row in found["rows"]] == ["alice"]
    page = client.get("/folds?q=%3Cscript%3E").text
    assert 'value="&lt;script&gt;"' in page
    assert "1 fold with &quot;&lt;script&gt;&quot;" in page
    assert client.get("/refusals?q=nothing-like-it").text.count("None.") == 1


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/folds/999", 404),
        ("/folds/5", 404),
        ("/folds/1?part=1", 404),
        ("/folds/1?part=x", 400),
        ("/folds?before=-1", 400),
        ("/folds?limit=0", 400),
        (f"/folds?q={'x' * 501}", 400),
        ("/models/%3Cscript%3E", 404),
        ("/folds/99999999999999999999999999", 404),
        (f"/folds/{'9' * 5000}", 404),
        ("/folds/٣", 404),
        ("/folds/x", 404),
    ],
)
def test_what_is_not_there_or_makes_no_sense_is_said(client: TestClient, path: str, status: int) -> None:
    for prefix in ("", "/api"):
        answer = client.get(prefix + path)
        assert answer.status_code == status, prefix + path
        assert "<script>" not in answer.text
        assert "Traceback" not in answer.text


def test_generations_tags_and_settings_are_shown_and_no_secret(client: TestClient, live: Live) -> None:
    generations = client.get("/api/generations").json()
    assert sum(one["in_force"] for one in generations) == 1
    assert generations[0]["nbytes"] > live.merge.state.generation_bytes() / 2
    assert "<b>in force</b>" in client.get("/storage").text
    page = client.get("/settings").text
    assert "hush" not in page
    assert re.search(r"promote_token</td><td[^>]*>\*{6,}", page)
    changed = {row["name"] for row in client.get("/api/settings").json() if row["changed"]}
    assert {"keep", "promote_token", "state"} <= changed
    assert "port" not in changed


def test_the_document_has_every_route_of_the_api_and_what_it_gives(client: TestClient, live: Live) -> None:
    document = client.get("/api/openapi.json").json()
    app = create_app(live, Metrics())
    routes = [one for one in app.routes if isinstance(one, Route) and one.path.startswith("/api/")]
    assert set(document["paths"]) == {one.path for one in routes}
    for path, operations in document["paths"].items():
        inside = set(re.findall(r"{(\w+)}", path))
        assert inside == {one["name"] for one in operations["get"]["parameters"] if one["in"] == "path"}, path
    text = str(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"]
    identity = client.get("/api/folds").json()["rows"][0]["shown"]["model_id"]
    for row in Machines(PageLook(live)).table():
        path = row.described.path.replace("{seq}", "2").replace("{identity}", identity)
        answer = client.get(path)
        assert answer.status_code == 200, path
        if path != "/api/status":  # sources have keys of their own there
            TypeAdapter(row.described.gives).validate_json(answer.text)


def test_the_picture_has_few_shapes_whatever_the_model_and_survives_odd_numbers() -> None:
    groups = tuple(f"<layer>{number}" for number in range(64))
    columns = [LayerColumn(seq, "<b>x", tuple(float(seq % 7) for _ in groups)) for seq in range(300)]
    columns += [LayerColumn(301, None, (0.0,) * 63 + (1e30,)), LayerColumn(302, "y", (float("inf"),) * 64)]
    drawn = pictures.layers(LayerPicture(groups, tuple(columns)))
    assert drawn.count("<rect") <= pictures.ROWS * pictures.COLUMNS + pictures.LEVELS + 1
    assert len(drawn) < 80_000
    assert "<layer>" not in drawn
    assert "<b>" not in drawn
    assert not pictures.layers(LayerPicture(groups, ()))
    assert "NaN" not in drawn


def test_addresses_of_models_are_short_and_plain(client: TestClient) -> None:
    for row in client.get("/api/folds").json()["rows"]:
        assert re.fullmatch("[0-9a-f]{16}", row["shown"]["model_id"])
        assert unquote(row["shown"]["model_id"]) == row["shown"]["model_id"]
