"""The commands about the Hub, as people type them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from continual.hub import Hub as Client
from tests.helpers import command, hubs, models
from tests.helpers.command import process
from tests.helpers.hubs import BASE, publish
from tests.loopback import TOKEN, Hub, faults, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as found:
        monkeypatch.setenv("CONTINUAL_STATE", str(tmp_path / "state"))
        yield found


@pytest.fixture
def run(hub: Hub) -> Callable[..., command.Done]:
    """A command that asks this Hub: HF_ENDPOINT is read when the client is imported, which it is by now."""
    return partial(command.run, client=Client(endpoint=hub.endpoint, token=TOKEN))


@pytest.fixture
def machine(hub: Hub) -> Callable[..., Any]:
    """The JSON that a command prints which asks this Hub."""
    return partial(command.machine, client=Client(endpoint=hub.endpoint, token=TOKEN))


def test_from_a_base_on_the_hub_to_a_release(
    tmp_path: Path, hub: Hub, run: Callable[..., command.Done], machine: Callable[..., Any]
) -> None:
    base = models.base(tmp_path / "base")
    sha = publish(hub, BASE, base, hubs.card(None, license="mit"))
    told = machine("init", f"{BASE}@{sha}", "--rule", "mean", "--dry-run")
    assert told["base"] == f"hf://{BASE}@{sha[:12]}"
    assert not (tmp_path / "state").exists()
    assert machine("init", BASE, "--rule", "mean")["base"] == f"{BASE}@{sha}"
    tuned = {
        name: publish(hub, f"org/{name}", models.fine_tune(base, tmp_path / name, i))
        for i, name in enumerate(("one", "two"))
    }
    publish(hub, "org/bad", models.base(tmp_path / "bad", shapes={**models.SHAPES, "model.norm.weight": (3,)}))
    publish(hub, "deny/me", models.fine_tune(base, tmp_path / "denied", 9))
    hub.commit("org/stranger", {"README.md": hubs.card("org/another")})
    look = ("watch", "--once", "--hub", "watch=true", "--hub", "settle=0", "--hub", "deny=deny/*")
    seen = {s["model"]: s for s in machine(*look, "--dry-run")}
    assert {name: s["take"] for name, s in seen.items()} == {
        "org/one": True,
        "org/two": True,
        "org/bad": False,
        "deny/me": False,
    }
    assert "shape [3]" in seen["org/bad"]["why"]
    assert seen["deny/me"]["why"] == "in deny"
    assert seen["org/one"]["revision"] == tuned["one"]
    assert len(machine("log")) == 1  # the dry run changed nothing
    shown = run(*look, "--dry-run").stdout
    assert "org/bad" in shown
    assert "in deny" in shown
    young = machine("watch", "--once", "--dry-run", "--hub", "watch=true", "--hub", "settle=900")
    assert all(not s["take"] and "is looked at in" in s["why"] for s in young if s["model"] == "org/one")
    taken = machine(*look, code=1)  # one is refused
    assert {(t["model"], t["fate"], t["reason"]) for t in taken} == {  # in the order in which their headers come
        ("org/one", "folded", None),
        ("org/two", "folded", None),
        ("org/bad", "refused", "shape"),
    }
    assert run(*look).stdout == "Nothing new.\n"
    assert machine("fold", f"hf://org/one@{tuned['one']}")[0]["fate"] == "known"
    again = {s["model"]: s["why"] for s in machine(*look, "--dry-run")}
    assert re.search(r"already settled as record [123] \(folded\)", again["org/one"])
    dry = run("release", "--release", "repo=me/merge", "--dry-run")
    would = re.search(r"Would release: record ([23]) to me/merge", dry.stdout)
    assert would is not None
    assert f"continual init hf://{BASE}@{sha}" in dry.stdout
    assert "me/merge" not in hub.state()
    out = machine("release", "--release", "repo=me/merge")
    assert (out["new"], out["seq"], out["commit"]) == (True, int(would[1]), hub.head("me/merge"))
    assert "Was out already" in run("release", "--release", "repo=me/merge").stdout
    assert run("watch", "--once", "--hub", "repos=org/one", "--hub", "settle=0").stdout == "Nothing new.\n"
    assert (
        run("watch", "--once", "--hub", "authors=me", "--hub", "settle=0", "--release", "repo=x/y").returncode == 2
    )  # no such flag
    taken = machine("watch", "--once", "--hub", "authors=me", "--hub", "settle=0", code=1)
    assert [(t["model"], t["reason"]) for t in taken] == [("me/merge", "own-release")]
    everything = "".join(f.read_text() for f in (tmp_path / "state/commits").iterdir())
    assert TOKEN not in everything


def test_what_is_wrong_is_said_with_what_to_do(tmp_path: Path, hub: Hub, run: Callable[..., command.Done]) -> None:
    base = models.base(tmp_path / "base")
    for arguments, code, words in (
        (("init", "org/none"), 2, "org/none: is not on the Hub, or not for this token"),
        (("init", "no-such-dir"), 2, "no such directory, and no repo"),
        (("init", "hf://a b"), 2, "no such directory, and no repo"),
    ):
        done = run(*arguments)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert run("init", base, "--rule", "mean").returncode == 0
    for arguments, code, words in (
        (("watch",), 2, "say --once"),
        (("watch", "--once"), 2, "nothing to watch"),
        (("watch", "--once", "--hub", "watch"), 2, "no key=value"),
        (("watch", "--once", "--hub", "wach=true"), 2, "wach"),
        (("release",), 2, "release.repo is not set"),
        (("release", "--release", "repo=merge"), 2, "write ORG/NAME"),
        (("release", "--release", "repo=me/merge", "--release", "tag={no}"), 2, "{seq} is all"),
        (("release", "--release", "repo=me/merge"), 2, "nothing is folded yet"),
        (("fold", "hf://org/none"), 2, "org/none: is not on the Hub"),
        (("plan", "hf://org/none"), 2, "org/none: is not on the Hub"),
    ):
        done = run(*arguments)
        assert (done.returncode, words in done.stderr) == (code, True), (arguments, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    hub.faults = faults.Times(faults.too_many(50), 1000)
    done = run("watch", "--once", "--hub", "authors=org")
    assert (done.returncode, "rate limit" in done.stderr) == (3, True)


def test_a_hub_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    state = tmp_path / "state"
    assert command.run("init", base, "--rule", "mean", "--state", state).returncode == 0
    done = process("fold", "hf://org/x", "--state", state, env={"HF_ENDPOINT": "http://me:s3cret@127.0.0.1:9"})
    assert (done.returncode, "the connection to the Hub (127.0.0.1:9) failed" in done.stderr) == (3, True), done.stderr
    assert "s3cret" not in done.stderr
    offline = ("run", "--state", state, "--port", "0", "--hub", "watch=true", "--hub", "bases=org/base")
    done = process(*offline, env={"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, "HF_HUB_OFFLINE is set" in done.stderr, "started" in done.stderr) == (2, True, False), (
        done.stderr
    )


def test_export_as_lora(
    tmp_path: Path, hub: Hub, run: Callable[..., command.Done], machine: Callable[..., Any]
) -> None:
    base = models.base(tmp_path / "base")
    assert run("init", base, "--rule", "mean").returncode == 0
    assert run("fold", models.fine_tune(base, tmp_path / "ft", 1)).returncode == 0
    done = run("export", tmp_path / "adapter", "--as-lora", "4", "--dtype", "bfloat16")
    assert "rank 4" in done.stdout
    assert "relative error" in done.stdout
    told = machine("export", tmp_path / "second", "--as-lora", "16")
    assert told["error_adapted"] < 1e-6
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="pt") as opened:
        assert len(opened.keys()) == 2 * json.loads(json.dumps(told["adapted"]))
    assert run("export", tmp_path / "adapter", "--as-lora", "4").returncode == 2
    assert run("export", tmp_path / "third", "--as-lora", "0").returncode == 2
    assert hub.journal.find() == []
