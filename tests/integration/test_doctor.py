"""`continual doctor`: what it finds, and what it says is to be done."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from continual.hub import Hub as Client
from continual.service import doctor
from tests.helpers import command, models
from tests.loopback import TOKEN, serving


@pytest.fixture
def state(memory: Path) -> Path:
    command.run("init", models.base(memory / "base"), "--state", memory / "state")
    (memory / "in").mkdir()
    return memory / "state"


def found(state: Path, *flags: str | Path, code: int = 0, client: Client | None = None) -> dict[tuple[str, str], Any]:
    """What it finds of each thing, by the thing and the level."""
    done = command.run("doctor", "--json", "--state", state, "--port", "0", *flags, client=client)
    assert done.returncode == code, done
    return {(one["about"], one["level"]): one for one in json.loads(done.stdout)}


def test_where_all_is_there_nothing_is_to_be_done(state: Path) -> None:
    told = found(state, "--watch", state.parent / "in", "--current", state.parent / "out" / "current")
    assert {level for _, level in told} == {"ok"}
    assert {"versions", "settings", "state", "disk", "base", "folders", "port", "device", "memory"} <= {
        about for about, _ in told
    }
    assert not (state.parent / "out").exists()
    shown = command.run("doctor", "--state", state, "--port", "0", "--watch", state.parent / "in").stdout
    assert "record 0, 0 models folded" in shown


def test_each_thing_that_is_missing_is_said_with_what_to_do(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = socket.create_server(("127.0.0.1", 0))
    base = state.parent / "base"
    (base / "model.safetensors").rename(base / "elsewhere")
    monkeypatch.setattr(doctor, "_mounted", lambda _path: "nfs4")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10))
    with held:
        told = found(
            state,
            "--watch",
            state.parent / "nowhere",
            "--memory",
            "999TB",
            "--port",
            str(held.getsockname()[1]),
            code=3,
        )
    assert told["folders", "fail"]["todo"] == f"mkdir -p {state.parent / 'nowhere'}"
    assert "keep_bytes" in told["disk", "fail"]["todo"]
    assert "nfs4" in told["disk", "warn"]["told"]
    assert "999 TB" in told["memory", "fail"]["told"]
    assert str(base) in told["base", "fail"]["told"]
    assert told["state", "ok"]


def test_no_state_is_one_finding_and_the_others_are_made(memory: Path) -> None:
    told = found(memory / "none", "--watch", memory, code=3)
    assert "continual init" in told["state", "fail"]["told"]
    assert told["device", "ok"]


@pytest.mark.parametrize(("token", "level"), [(TOKEN, "ok"), ("wrong", "fail")])
def test_the_hub_is_asked_where_something_is_wanted_of_it(state: Path, token: str, level: str) -> None:
    with serving() as hub:
        client = Client(endpoint=hub.endpoint, token=token)
        asked = ("--watch", state.parent / "in", "--release", "repo=org/merged")
        told = found(state, *asked, code=0 if level == "ok" else 3, client=client)
    assert ("hub", "ok") in told
    assert ("token", level) in told
    if level == "ok":
        assert "role is write" in told["token", "ok"]["told"]


def test_a_token_that_may_only_read_cannot_release(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        client = Client(endpoint=hub.endpoint, token=TOKEN)
        me = {"name": "tester", "auth": {"accessToken": {"role": "read"}}}
        monkeypatch.setattr(client.api, "whoami", lambda: me)
        told = found(state, "--watch", state.parent / "in", "--release", "repo=org/merged", code=3, client=client)
        assert "cannot release to org/merged" in told["token", "fail"]["told"]
        told = found(state, "--hub", "watch=true", client=client)
        assert ("token", "ok") in told


def test_a_hub_that_does_not_answer_is_said(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    told = found(state, "--hub", "watch=true", code=3, client=Client(endpoint=address, token=TOKEN))
    assert address in told["hub", "fail"]["told"]
