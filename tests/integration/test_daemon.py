"""The daemon as a real process: folds what is published, survives SIGKILL and SIGTERM, answers over HTTP, stops loudly
on damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from continual import api, making
from continual.api import Merge
from continual.config import Settings
from continual.errors import Abandoned
from continual.state import State
from continual.state.verify import verify
from tests.helpers import command, models, running
from tests.helpers.services import LIMIT, daemon, get, status, until, url

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = models.base(tmp_path / "base")
    (tmp_path / "in").mkdir()
    making.init(base, tmp_path / "state")
    return base, tmp_path / "state", tmp_path / "in"


def test_folds_is_killed_comes_back_and_stops(place: tuple[Path, Path, Path]) -> None:
    base, state, watch = place
    models.fine_tune(base, watch / "early", 1)
    with daemon(state, watch) as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 1, "the one published before the start is folded")
        models.fine_tune(base, watch / "live", 2)
        until(lambda: status(address)["folds"] == 2, "the one published now is folded")
        assert get(f"{address}/healthz")[0] == 200
        assert get(f"{address}/readyz")[0] == 200
        metrics = get(f"{address}/metrics")[1]
        assert "continual_folds_total 2.0" in metrics
        page = get(f"{address}/")[1]
        assert "live" in page
        nowhere = "http://127.0.0.1:9"
        for proxy in ({}, {"http_proxy": nowhere, "HTTP_PROXY": nowhere, "no_proxy": "", "NO_PROXY": ""}):
            told = command.process("status", "--state", state, "--json", env=proxy)
            assert json.loads(told.stdout)["pid"] == process.pid, f"through the proxy {proxy}"
        busy = command.process("fold", watch / "live", "--state", state)
        assert busy.returncode == 5
        assert str(process.pid) in busy.stderr
        assert address in busy.stderr
        process.send_signal(signal.SIGKILL)
        process.wait()
    with_a_value_head = {"v_head.summary.weight": torch.ones(1, 16)}
    models.fine_tune(base, watch / "while-down", 3, change=lambda tensors: tensors.update(with_a_value_head))
    with daemon(state, watch, "--log-json") as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 3, "the one published while it was down is folded")
        told = '"left_out": "v_head.summary.weight"'
        until(lambda: told in (state.parent / "daemon.log").read_text(), "the log says what was left out")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    with State.open(state) as opened:
        assert [c.entry.candidate.name for c in opened.ledger.folds()] == ["early", "live", "while-down"]
        assert verify(opened) == []


def test_bad_candidates_do_not_stop_it_and_the_next_is_folded(place: tuple[Path, Path, Path]) -> None:
    base, state, watch = place
    (watch / "pickle").mkdir()
    (watch / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    models.fine_tune(base, watch / "outsider", 1)
    outside = models.fine_tune(base, watch.parent / "outside", 2)
    (watch / "outsider" / "model.safetensors").unlink()
    (watch / "outsider" / "model.safetensors").symlink_to(outside / "model.safetensors")
    with daemon(state, watch) as process:
        address = url(process, state)
        models.fine_tune(base, watch / "good", 3)
        until(lambda: status(address)["folds"] == 1, "the good one is folded")
        until(lambda: "continual_refusals_total" in get(f"{address}/metrics")[1], "refusals are counted")
    with State.open(state) as opened:
        refused = {c.entry.candidate.name: c.entry.reason for c in opened.ledger.log if c.entry.fate == "refused"}
    assert set(refused) == {"pickle", "outsider"}
    assert refused["pickle"] == "pickle"


def test_current_link_follows(place: tuple[Path, Path, Path]) -> None:
    base, state, watch = place
    link = state.parent / "published" / "current"
    with daemon(state, watch, "--current", str(link)):
        models.fine_tune(base, watch / "a", 1)
        until(
            lambda: link.exists() and len(json.loads((link / "continual.json").read_text())["folded"]) == 1,
            "the link shows the fold",
        )


def test_damage_stops_it_loudly(place: tuple[Path, Path, Path]) -> None:
    base, state, watch = place
    with api.open(state, write=True) as merge:
        merge.fold(models.fine_tune(base, state.parent / "ft", 1))
        chunk = next(p for p in (state / "generations").rglob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    models.fine_tune(base, watch / "next", 2)
    with daemon(state, watch) as process:
        assert process.wait(LIMIT) == 4
    assert "halted" in (state.parent / "daemon.log").read_text()
    with State.open(state) as opened:
        assert len(opened.ledger.folds()) == 1


@pytest.mark.parametrize("inside", ["state", "current"])
def test_our_own_output_in_a_watched_folder_is_a_wrong_configuration(
    place: tuple[Path, Path, Path], inside: str
) -> None:
    _, state, watch = place
    flags = (
        ["--watch", str(state.parent)]
        if inside == "state"
        else ["--watch", str(watch), "--current", str(watch / "current")]
    )
    told = command.process("run", "--state", state, *flags)
    assert told.returncode == 2
    assert "watch" in told.stderr
    assert os.listdir(state / "generations") == []


def test_a_failed_publication_is_tried_again(place: tuple[Path, Path, Path]) -> None:
    base, state, watch = place
    link = state.parent / "releases/current"
    link.mkdir(parents=True)  # in the way
    models.fine_tune(base, watch / "alice", 1)
    with daemon(state, watch, "--current", str(link)):
        until(lambda: "publish failed" in (state.parent / "daemon.log").read_text(), "the failure is logged")
        link.rmdir()
        until(link.is_symlink, "it is tried again without another fold")
        until((link / "continual.json").is_file, "the release is whole")


def test_a_publication_that_a_stop_gives_up_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a cluster writes it while a fold is drained: nothing is wrong, and the next start makes it."""
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    models.fine_tune(base, tmp_path / "in/alice", 1)
    begun, said = threading.Event(), [""]

    def is_said() -> bool:
        said[0] += capsys.readouterr().err
        return any(word in said[0] for word in ("abandoned", "publish failed"))

    def visit(address: str) -> None:
        until(begun.is_set, "a publication has begun")
        models.fine_tune(base, tmp_path / "in/bob", 2)
        until(lambda: status(address)["current"], "another fold has begun")

    settings = Settings(
        state=tmp_path / "state", watch=[tmp_path / "in"], settle=0.05, drain=0.0, current=tmp_path / "out/current"
    )
    with Merge(settings, write=True) as merge:

        def given_up(*_given: Any, **_named: Any) -> Path:
            begun.set()
            assert merge.stopping.wait(LIMIT)
            raise Abandoned("the work was given up because continual is stopping")

        fold = merge.fold

        def drained(*given: Any, **named: Any) -> Any:
            if begun.is_set():
                until(is_said, "what became of the publication is in the log")
            return fold(*given, **named)

        monkeypatch.setattr(merge, "export", given_up)
        monkeypatch.setattr(merge, "fold", drained)
        running.until(running.made(merge), visit)
    events = [json.loads(line) for line in (said[0] + capsys.readouterr().err).splitlines()]
    assert [(one["event"], one["level"]) for one in events if one.get("what") == "publish"] == [("abandoned", "info")]
    assert [one for one in events if one["level"] == "error"] == []


def test_a_daemon_that_drains_lives_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    models.fine_tune(base, tmp_path / "in/alice", 1)

    def visit(address: str) -> None:
        until(lambda: status(address)["current"], "a fold has begun")
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: status(address)["health"] == "stopping", "the signal is heard")
        beaten = drained.live._beaten
        until(lambda: drained.live._beaten > beaten, "it lives while it drains")
        told = status(address)
        assert told["why"].startswith("stops on SIGTERM: what is under way has until ")
        assert told["current"]["model"] == "alice"

    with Merge(Settings(state=tmp_path / "state", watch=[tmp_path / "in"], settle=0.2), write=True) as merge:
        fold = merge.fold

        def slow(*given: Any, **named: Any) -> Any:
            assert merge.stopping.wait(LIMIT), "the second signal gives it up"
            return fold(*given, **named)

        monkeypatch.setattr(merge, "fold", slow)
        drained = running.made(merge)
        running.until(drained, visit)
        assert merge.head == 0


@pytest.mark.parametrize(
    ("drain", "how", "folds"), [("60", "once", 2), ("0", "once", 1), ("60", "twice", 1), ("0", "command", 2)]
)
def test_sigterm_finishes_the_fold_or_gives_it_up_in_time_a_second_one_at_once_and_a_drain_never(
    tmp_path: Path, drain: str, how: str, folds: int
) -> None:
    base = models.base(
        tmp_path / "base", shapes={f"model.layers.{i}.mlp.up_proj.weight": (512, 512) for i in range(24)}
    )
    state, watch = tmp_path / "state", tmp_path / "in"
    watch.mkdir()
    making.init(base, state)
    models.fine_tune(base, watch / "first", 1)
    # one tensor after the other, so that a fold of little takes long enough to be met
    with daemon(state, watch, "--workers", "1", "--drain", drain) as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 1, "the first is folded")
        models.fine_tune(base, watch / "second", 2)
        until(lambda: (status(address)["current"] or {}).get("done", 0) >= 1, "the second is being folded")
        if how == "command":
            shutil.copytree(watch / "second", watch / "third")
            told = command.run("drain", "--state", state)
            assert told.stdout == f"The daemon has ended (process {process.pid}); nothing is lost.\n", told.stderr
        else:
            process.send_signal(signal.SIGTERM)
        if how == "twice":
            until(lambda: status(address)["health"] == "stopping", "the first signal is heard")
            process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    assert ("abandoned" in (tmp_path / "daemon.log").read_text()) is (folds == 1)
    with State.open(state) as found:
        assert len(found.ledger.folds()) == folds
        assert found.orphans == ()
        assert verify(found) == []
    assert command.run("drain", "--state", state).stdout == "No daemon runs.\n"
