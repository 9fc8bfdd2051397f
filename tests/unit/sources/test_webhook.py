"""The webhook: who may push, what is kept before the answer, what is passed over."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from continual.errors import Damaged
from continual.sources.webhook import LARGEST, Payload, Webhook, push_of
from continual.state.inbox import Inbox, PushRecord, load_cursor, save_cursor

SHA = "a" * 40
SECRET = {"X-Webhook-Secret": "s3cret"}


def payload(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": "org/ft", "id": "1", "private": False, "headSha": SHA, "owner": {"id": "2"}},
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "b" * 40, "newSha": SHA}],
        "webhook": {"id": "3", "version": 3},
    }
    for key, value in changes.items():
        first, _, rest = key.partition("__")
        if rest:
            body[first] = body[first] | {rest: value}
        else:
            body[first] = value
    return body


@pytest.mark.parametrize(
    ("changes", "push"),
    [
        ({}, ("org/ft", SHA)),
        ({"event__action": "create", "event__scope": "repo", "updatedRefs": []}, ("org/ft", SHA)),
        ({"updatedRefs": [], "repo__headSha": None}, ("org/ft", None)),
        ({"updatedRefs": [{"ref": "refs/heads/main", "newSha": "c" * 40}]}, ("org/ft", "c" * 40)),
        ({"event__action": "move", "event__scope": "repo"}, ("org/ft", SHA)),
        ({"event__action": "delete", "event__scope": "repo"}, None),
        ({"event__scope": "discussion"}, None),
        ({"event__scope": "repo.config"}, None),
        ({"repo__type": "dataset"}, None),
        ({"updatedRefs": [{"ref": "refs/heads/wip", "newSha": SHA}]}, None),
        ({"updatedRefs": [{"ref": "refs/tags/v1", "newSha": SHA}]}, None),
    ],
)
def test_what_a_delivery_says(changes: dict[str, Any], push: tuple[str, str | None] | None) -> None:
    assert push_of(Payload.model_validate(payload(**changes))) == push


@pytest.fixture
def told() -> list[int]:
    return []


@pytest.fixture
def ask(tmp_path: Path, told: list[int]) -> Callable[..., int]:
    webhook = Webhook("s3cret", Inbox(tmp_path), lambda: told.append(1))
    client = TestClient(Starlette(routes=[Route("/webhook", webhook.answer, methods=["POST"])]))

    def post(body: Any, headers: dict[str, str] = SECRET) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return int(client.post("/webhook", content=content, headers=headers).status_code)

    return post


def test_accepted_pushes_are_on_disk_once(tmp_path: Path, ask: Callable[..., int], told: list[int]) -> None:
    assert [ask(payload()), ask(payload()), ask(payload(repo__headSha=None))] == [202, 202, 202]
    items = Inbox(tmp_path).items()
    assert [(i.repo, i.sha) for i in items.values()] == [("org/ft", SHA)]
    assert ask(payload(updatedRefs=[], repo__headSha="c" * 40)) == 202
    assert len(Inbox(tmp_path).items()) == 2
    assert told == [1, 1]


@pytest.mark.parametrize(
    "headers", [{}, {"X-Webhook-Secret": ""}, {"X-Webhook-Secret": "s3cre"}, {"X-Webhook-Secret": "s3cret "[:-1] + "x"}]
)
def test_without_the_secret_nothing_is_kept(
    tmp_path: Path, ask: Callable[..., int], told: list[int], headers: dict[str, str]
) -> None:
    assert ask(payload(), headers) == 401
    assert (Inbox(tmp_path).items(), told) == ({}, [])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b"{}", 400),
        (b"\xff\xfe", 400),
        (payload(repo__name="../../etc"), 400),
        (payload(repo__name="org/a\nb"), 400),
        (payload(updatedRefs=[], repo__headSha="HEAD"), 400),
        (payload(updatedRefs="x"), 400),
        (payload(event=None), 400),
        (b'{"event":' + b"[" * 30_000, 400),
        (b" " * (LARGEST + 1), 413),
        (payload(event__action="delete", event__scope="repo"), 202),
    ],
)
def test_what_is_no_push_is_not_kept(
    tmp_path: Path, ask: Callable[..., int], told: list[int], body: Any, status: int
) -> None:
    assert ask(body) == status
    assert (Inbox(tmp_path).items(), told) == ({}, [])


def test_a_full_inbox_is_said_to_whoever_pushes(ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.state.inbox.MOST", 1)
    assert ask(payload()) == 202
    assert ask(payload(updatedRefs=[], repo__headSha="d" * 40)) == 503
    assert ask(payload()) == 202


def test_the_same_push_at_once_from_many_threads_is_one(tmp_path: Path) -> None:
    inbox, new = Inbox(tmp_path), list[bool]()
    threads = [
        threading.Thread(target=lambda: new.append(inbox.put("a" * 32, PushRecord("o/m", None, 1.0)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inbox.items()) == 1
    inbox.remove("a" * 32)
    inbox.remove("a" * 32)
    assert inbox.items() == {}


def test_altered_files_are_damage_that_names_them(tmp_path: Path) -> None:
    Inbox(tmp_path).put("b" * 32, PushRecord("o/m", None, 1.0))
    save_cursor(tmp_path, "hub", {"high": {}, "swept": {}, "seen": []})
    assert load_cursor(tmp_path, "hub") == {"high": {}, "swept": {}, "seen": []}
    assert load_cursor(tmp_path, "other") is None
    for file in (tmp_path / "inbox" / f"{'b' * 32}.json", tmp_path / "sources/hub.json"):
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(Damaged, match="inbox"):
        Inbox(tmp_path).items()
    with pytest.raises(Damaged, match=r"hub\.json"):
        load_cursor(tmp_path, "hub")
