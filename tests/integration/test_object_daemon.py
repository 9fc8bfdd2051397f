"""The commands and the daemon over a state on an object store: what a user does there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from continual.service import asking, doctor
from continual.state import heartbeat, lock
from continual.stores import ObjectPath, here, where
from tests.helpers import models, object_stores
from tests.helpers.command import run
from tests.helpers.preloaded import Process
from tests.helpers.services import status, until

pytestmark = pytest.mark.slow


@pytest.fixture
def at(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectPath]:
    found = object_stores.state_at(moto, f"daemon/{tmp_path.name}", monkeypatch)
    monkeypatch.setenv("CONTINUAL_STATE", str(found))
    monkeypatch.setenv("CONTINUAL_LEASE", "2")
    yield found
    shutil.rmtree(here(found))


@pytest.fixture
def daemon() -> Iterator[list[Process]]:
    begun: list[Process] = []
    try:
        yield begun
    finally:
        for process in begun:
            process.kill()


def test_a_day_with_a_state_on_a_store(at: ObjectPath, tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    for number in (1, 2):
        models.fine_tune(base, tmp_path / f"ft{number}", number)

    def done(*words: object) -> str:
        found = run(*words)
        assert found.returncode == 0, found.stderr
        return found.stdout

    assert f"under {at}" in done("init", base)
    assert run("init", base).returncode == 2
    done("fold", tmp_path / "ft1", tmp_path / "ft2")
    done("tag", "two")
    done("unfold", "ft1", "--yes")
    done("rollback", "two", "--yes")
    assert "rollback" in done("log")
    assert json.loads(done("status", "--json"))["disk_free_bytes"] is None
    assert "clean" in done("verify")
    assert "honours conditional writes" in run("doctor").stdout
    done("backup", tmp_path / "copy")
    done("export", tmp_path / "of-store")
    done("export", tmp_path / "of-copy", "--state", tmp_path / "copy")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("of-store", "of-copy")]
    assert weights[0] == weights[1]
    certified = run("unfold", "ft2", "--yes", "--certificate", tmp_path / "proof.json")
    assert (certified.returncode, "a certificate is of files" in certified.stderr) == (2, True), certified.stderr
    assert "2 folded" in done("status")
    missing = run("status", "--state", "s3://no-such-bucket/x")
    assert (missing.returncode, "there is no such bucket: make it first" in missing.stderr) == (2, True), missing.stderr


def test_a_daemon_that_was_killed_is_followed_once_its_lease_has_run_out(
    at: ObjectPath, tmp_path: Path, daemon: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.base(tmp_path / "base")
    assert run("init", base).returncode == 0
    watch = tmp_path / "in"
    watch.mkdir()

    def start() -> str:
        with (tmp_path / "daemon.log").open("a") as log:
            daemon.append(Process("run", "--watch", watch, "--port", "0", "--settle", "0.2", stderr=log.fileno()))

        def listening() -> str | None:
            assert daemon[-1].poll() is None, (tmp_path / "daemon.log").read_text()
            held = lock.holder(at)
            return held.url if held.pid == daemon[-1].pid else None

        return str(until(listening, "the daemon listens"))

    address = start()
    models.fine_tune(base, watch / "alice", 1)
    until(lambda: status(address)["folds"] == 1, "alice is folded")
    assert (asking.ask(at) or {})["state"] == str(at)
    assert run("tag", "one").returncode == 0  # by the daemon's socket
    assert (here(at) / "control.sock").exists()
    busy = run("fold", tmp_path / "in/alice", "--port", "1")
    assert busy.returncode != 0
    os.kill(daemon[-1].pid, signal.SIGKILL)
    daemon[-1].wait()
    _, alive = doctor._on_store(at)
    assert f"process {daemon[-1].pid} on " in alive.told
    assert " s ago, and has the state open for writing for 2 s from then" in alive.told
    with monkeypatch.context() as later:
        later.setattr(heartbeat, "now", lambda _path: datetime.now(UTC) + timedelta(seconds=10))
        _, dead = doctor._on_store(at)
    assert "and its lease of 2 s ran out: it was killed, or does not reach the store" in dead.told
    models.fine_tune(base, watch / "bob", 2)
    address = start()
    until(lambda: status(address)["folds"] == 2, "bob is folded")
    daemon[-1].send_signal(signal.SIGTERM)
    assert daemon[-1].wait(60) == 0
    assert lock.holder(at).pid is None
    assert run("verify").returncode == 0


def test_without_the_extra_its_name_is_said(at: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    from continual.errors import Misconfigured
    from continual.state import State

    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(Misconfigured, match=r"pip install 'continual\[s3\]'"):
        State.open(where(str(at)))
