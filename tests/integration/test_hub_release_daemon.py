"""The daemon that releases: killed at every point of a release, with a token that is refused, and with hooks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import continual
from continual.state.entries import HookEntry
from continual.state.parts import HookCall
from tests.helpers import models, services
from tests.helpers.hubs import made
from tests.helpers.released import REPO, count, published, published_records, releases
from tests.loopback import TOKEN, Hub, environment, faults, serving
from tests.loopback.repos import Commit

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


# The daemon is killed from the Hub's side: at what it asks for there, or has just done
POINTS: dict[str, tuple[str, str]] = {
    "between the fold and the release": ("GET", rf"/api/models/{REPO}"),
    "before the repo is made": ("POST", "/repos/create"),
    "before the weights are up, by xet": ("POST", "/xorbs/"),
    "before the weights are up, by LFS": ("PUT", ""),
    "before the commit": ("POST", "/commit/"),
    "after the commit, before its answer": ("", "committed"),
    "before the tag": ("POST", "/tag/"),
}


class Killer:
    """Kills a process at the first request that matches, or right after the release was committed."""

    def __init__(self, hub: Hub, point: str) -> None:
        self.method, self.path = POINTS[point]
        self.process: subprocess.Popen[str] | None = None
        self.done = False
        if self.path == "committed":
            hub.listeners.append(
                lambda change: self.kill() if REPO in str(change.repo.id) and change.refs and has(hub) else None
            )
        else:
            hub.on_request = self.look

    def look(self, request: Any) -> None:
        import re

        about = (
            REPO in request.path or self.method == "PUT" or "/repos/create" in request.path or "/xorbs/" in request.path
        )
        if request.method == self.method and about and re.search(self.path, request.path):
            self.kill()

    def kill(self) -> None:
        if self.process is not None and not self.done:
            self.done = True
            os.kill(self.process.pid, signal.SIGKILL)


def has(hub: Hub) -> bool:
    return REPO in hub.state() and "continual.json" in hub.repo(REPO).find("main").files  # type: ignore[union-attr]


@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_killed_while_it_releases_makes_one_release_of_a_fold(tmp_path: Path, hub: Hub, point: str) -> None:
    base = made(tmp_path, hub)
    (tmp_path / "in").mkdir()
    state, env = tmp_path / "state", environment(hub, tmp_path) | {"HF_HUB_DISABLE_XET": str(int("LFS" in point))}
    flags = ("--release", f"repo={REPO}", "--release", "every=true", "--drain", "5")
    killer = Killer(hub, point)
    with services.daemon(state, tmp_path / "in", *flags, environment=env) as process:
        killer.process = process
        models.fine_tune(base, tmp_path / "in/alice", 1)
        services.until(lambda: process.poll() is not None, "the kill")
    assert killer.done
    assert process.returncode == -signal.SIGKILL
    with services.daemon(state, tmp_path / "in", *flags, environment=env) as process:
        models.fine_tune(base, tmp_path / "in/bob", 2)
        services.until(lambda: published(state) == [1, 2] or None, "both releases")
        process.terminate()
        assert process.wait(30) == 0
    with continual.open(state) as ours:
        folds = [fold.seq for fold in ours.state.ledger.folds()]
    assert [seq for seq, _ in releases(hub)] == published_records(state) == folds
    assert count(hub) == 2
    chain: list[Commit] = hub.history(REPO)
    assert [c.parent for c in chain] == [*(c.sha for c in chain[1:]), None]
    assert {f"record-{seq}": sha for seq, sha in releases(hub)} == hub.repo(REPO).tags
    assert not (state / "staging").exists()


def test_a_token_that_is_refused_waits_for_a_person_and_a_hub_that_is_down_does_not(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    (tmp_path / "in").mkdir()
    models.fine_tune(base, tmp_path / "in/alice", 1)
    log = tmp_path / "daemon.log"

    def failed() -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        return [row for row in rows if row["event"] == "release failed"]

    waits = []
    for token, fault in (("hf_nobody", None), (TOKEN, faults.Times(faults.Status(409), 999))):
        log.unlink(missing_ok=True)
        hub.faults = fault
        env = environment(hub, tmp_path, token=token)
        with services.daemon(tmp_path / "state", tmp_path / "in", "--release", f"repo={REPO}", environment=env):
            services.until(failed, "the release fails")
        waits.append(failed()[0]["retry_seconds"])
        assert token not in log.read_text()
    assert waits == [3600.0, 5.0]


def test_hooks_are_told_and_a_failing_one_blocks_nothing(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    (tmp_path / "in").mkdir()
    told = tmp_path / "told"
    config = tmp_path / "continual.toml"
    config.write_text(
        f"""
current = "{tmp_path / "current"}"
[release]
repo = "{REPO}"
[[hooks]]
kind = "command"
command = ["sh", "-c", "echo $PUBLISHED_SEQ $HF_TOKEN >> {told}"]
[[hooks]]
kind = "http"
url = "http://127.0.0.1:9/"
tries = 1
[[hooks]]
kind = "command"
command = ["sh", "-c", "echo {{commit}} {{tag}} >> {told}.release"]
after = "release"
"""
    )
    with services.daemon(
        tmp_path / "state", tmp_path / "in", "--config", str(config), environment=environment(hub, tmp_path)
    ) as process:
        address = services.url(process, tmp_path / "state")
        models.fine_tune(base, tmp_path / "in/alice", 1)
        services.until(lambda: len(hooks_of(tmp_path / "state")) == 3 or None, "the hooks' records")
        text = services.get(f"{address}/metrics")[1]
    assert 'continual_hooks_total{kind="http",result="failed"} 1.0' in text
    assert 'continual_hooks_total{kind="command",result="ok"} 2.0' in text
    assert told.read_text() == "1\n"  # and no token
    assert told.with_suffix(".release").read_text() == f"{hub.head(REPO)} record-1\n"
    assert sorted((h.kind, h.ok) for h in hooks_of(tmp_path / "state")) == [
        ("command", True),
        ("command", True),
        ("http", False),
    ]


def hooks_of(state: Path) -> list[HookCall]:
    with continual.open(state) as ours:
        return [c.entry.hook for c in ours.state.ledger.log if isinstance(c.entry, HookEntry)]
