"""Commands over HTTP, on a daemon that runs: buttons for who has signed in, an address for programs, a line in the log
for each; and that nobody else gives any."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from continual import making
from tests.helpers import models
from tests.helpers.services import daemon, status, until, url

pytestmark = pytest.mark.slow

TOKEN = "sixteen letters!!"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A daemon with two folds and a refusal, and its log."""
    path = tmp_path_factory.mktemp("commanded")
    base, state, watch = models.base(path / "base"), path / "state", path / "in"
    making.init(base, state, making.Recipe(rule="mean"))
    for seed, name in enumerate(("<b>alice", "bob")):
        models.fine_tune(base, watch / name, seed)
    models.fine_tune(base, watch / "mallory", 9, size=9.0)
    environment = {"CONTINUAL_ADMIN_TOKEN": TOKEN, "PATH": "/usr/bin:/bin"}
    with daemon(state, watch, environment=environment) as process:
        address = url(process, state)
        until(lambda: status(address)["head"] == 3, "two folds and a refusal")
        yield address, path / "daemon.log"


def signed_in(address: str) -> httpx.Client:
    client = httpx.Client(base_url=address, headers={"origin": address}, follow_redirects=True)
    answer = client.post("/sign-in", data={"token": TOKEN})
    assert answer.url.path == "/commands", answer.text
    return client


def pressed(client: httpx.Client, path: str, button: str, **filled: str) -> str:
    """Presses a button of a page, and gives the page that comes then, without what stood there before."""
    page = client.get(path).text
    forms = re.findall(r'<form method="post" action="/commands">(.*?)</form>', page)
    form = next(form for form in forms if f">{button}</button>" in form)
    hidden = re.findall(r'type="hidden" name="([^"]*)" value="([^"]*)"', form)
    answer = client.post("/commands", data={k: html.unescape(v) for k, v in hidden} | filled)
    assert answer.status_code == 200, answer.text
    return re.findall(r"<article.*?</article>", answer.text)[0]


def logged(log: Path) -> list[dict[str, Any]]:
    """What the log says of commands, and of who asked."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] in ("command", "command failed", "signed in", "sign-in refused")]


def test_a_command_is_a_button_for_who_has_signed_in_and_has_a_line_in_the_log(served: tuple[str, Path]) -> None:
    address, log = served
    client = signed_in(address)
    assert "Pause folding" in client.get("/").text
    pressed(client, "/", "Pause folding")
    assert status(address)["health"] == "paused"
    pressed(client, "/", "Fold again")
    assert status(address)["health"] == "ok"
    pressed(client, "/folds/2", "Tag", name="both")
    assert client.get("/api/folds/2").json()["tags"] == ["both"]
    lines = [line for line in logged(log) if line["event"] == "command"]
    assert [line["command"] for line in lines] == ["pause", "resume", "tag"]
    assert {line["by"] for line in lines} == {"page, 127.0.0.1"}
    assert logged(log)[0]["event"] == "signed in"
    assert TOKEN not in log.read_text()


def test_what_cannot_be_taken_back_is_looked_at_first(served: tuple[str, Path]) -> None:
    address, _ = served
    client = signed_in(address)
    before = status(address)["head"]
    told = pressed(client, "/folds/1", "Take it out …")
    assert "done" in told
    assert "Do it" in told
    assert status(address)["head"] == before, "it was looked at"
    assert 'name="expected" value="0"' in told, "what a person agrees to"
    pressed(client, "/commands", "Do it")
    assert status(address)["folds"] == 1
    assert "taken out in record" in client.get("/folds/1").text


def test_a_refused_model_is_accepted_with_a_reason(served: tuple[str, Path]) -> None:
    address, _ = served
    client = signed_in(address)
    row = client.get("/api/refusals").json()["rows"][0]
    pressed(client, f"/models/{row['model_id']}", "Accept it", because="<i>it is large on purpose")
    records = client.get("/api/log").json()
    asked = next(record for record in records if record["kind"] == "retry")
    assert asked["numbers"] == {"because": "<i>it is large on purpose", "by": "an operator, on the status page"}
    until(lambda: "mallory" in [fold["model"] for fold in status(address)["last_folds"]], "it is folded")
    assert "<i>" not in client.get(f"/models/{row['model_id']}").text
    assert client.get("/api/refusals").json()["rows"][0]["now"] == "in the merge"


@pytest.mark.parametrize(
    ("headers", "change"),
    [
        ({"origin": "http://evil.example"}, {}),
        ({"origin": "null"}, {}),
        ({"sec-fetch-site": "cross-site"}, {}),
        ({"sec-fetch-site": "same-site"}, {}),
        ({}, {"form": "another"}),
        ({}, {"form": ""}),
    ],
)
def test_a_form_of_another_page_does_nothing(
    served: tuple[str, Path], headers: dict[str, str], change: dict[str, str]
) -> None:
    address, log = served
    client = signed_in(address)
    word = re.findall(r'name="form" value="([^"]*)"', client.get("/commands").text)[0]
    before = len(logged(log))
    for path in ("/commands", "/sign-out"):
        answer = client.post(path, data={"form": word, "command": "pause"} | change, headers=headers)
        assert answer.status_code == 403
    assert status(address)["paused"] is None
    assert len(logged(log)) == before
    assert "Asked for here" in client.get("/commands").text, "the session stands"


def test_nobody_gives_a_command_without_the_token(served: tuple[str, Path]) -> None:
    address, log = served
    stranger = httpx.Client(base_url=address)
    assert "Pause folding" not in stranger.get("/").text
    assert 'action="/sign-in"' in stranger.get("/commands").text
    assert stranger.post("/commands", data={"command": "pause"}).status_code == 401
    assert stranger.post("/sign-in", data={"token": TOKEN[:-1]}).status_code == 401
    forged = stranger.post("/sign-in", data={"token": TOKEN}, headers={"origin": "http://evil.example"})
    assert (forged.status_code, len(stranger.cookies)) == (403, 0)
    for headers in ({}, {"authorization": f"Basic {TOKEN}"}, {"cookie": "continual-x=y; \x7f"}):
        assert stranger.post("/api/commands", json={"command": "pause"}, headers=headers).status_code == 401
        assert stranger.get("/api/commands/1", headers=headers).status_code == 401
    assert status(address)["paused"] is None
    assert logged(log)[-1]["event"] == "sign-in refused"


@pytest.mark.parametrize("other", ['a={"b": 1}', "a=b c", "x[y]=1", "=", '"', 'a="open', "\xfc=1"])
def test_a_cookie_of_another_service_of_this_host_does_not_hide_ours(served: tuple[str, Path], other: str) -> None:
    address, _ = served
    cookies = [f"{name}={value}" for name, value in signed_in(address).cookies.items()]
    for order in ([other, *cookies], [*cookies, other]):
        page = httpx.get(f"{address}/commands", headers={"cookie": "; ".join(order).encode("latin-1")})
        assert "Asked for here" in page.text, order


def test_a_session_ends(served: tuple[str, Path]) -> None:
    address, _ = served
    client = signed_in(address)
    cookie = client.post("/sign-in", data={"token": TOKEN}, follow_redirects=False).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    page = client.get("/commands").text
    word = re.findall(r'name="form" value="([^"]*)"', page)[0]
    assert client.post("/sign-out", data={"form": word}).status_code == 200
    assert client.post("/commands", data={"form": word, "command": "pause"}).status_code == 401


def test_a_program_brings_the_token_and_hears_what_came_of_it(served: tuple[str, Path]) -> None:
    address, log = served
    client = httpx.Client(base_url=address, headers=AUTHORIZED)
    done = client.post("/api/commands", json={"command": "tag", "name": "by-api", "at": 2})
    assert (done.status_code, done.json()["state"]) == (200, "done")
    assert done.json()["answer"]["tags"]["by-api"] == 2
    assert client.get(f"/api/commands/{done.json()['number']}").json() == done.json()
    assert logged(log)[-1]["by"] == "api, 127.0.0.1"
    failed = client.post("/api/commands", json={"command": "tag", "name": "late", "at": 999})
    assert (failed.status_code, failed.json()["errand"]["kind"]) == (409, "Misconfigured")
    assert "no record 999" in failed.json()["error"]
    assert logged(log)[-1]["event"] == "command failed"
    for body in (b"{", b"[]", b'{"command": "fold"}', b'{"command": "tag"}', b"\xff", b"{" * 70000, b'{"command": 1}'):
        assert client.post("/api/commands", content=body).status_code == 400, body[:30]
    assert client.get("/api/commands/999").status_code == 404
    described = client.get("/api/openapi.json").json()["paths"]
    assert set(described["/api/commands"]) == {"post"}
    assert described["/api/commands"]["post"]["security"] == [{"admin": []}]
