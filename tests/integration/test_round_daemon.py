"""The daemon with rounds, as a real process: who is published waits, a round runs by itself, and a kill in the middle
of it costs nothing."""

from __future__ import annotations

import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from continual import api, making
from continual.errors import Abandoned
from continual.state import State
from continual.state.entries import RoundEntry
from continual.state.verify import verify
from tests.helpers import quadratic
from tests.helpers.services import LIMIT, daemon, get, status, until, url

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ASK = ("--objective", "tests.helpers.quadratic:make", "--max-base-ratio", "10", "--rescan", "1")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # where the objective can be imported
    return quadratic.world(tmp_path)


def running(state: Path, *flags: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return daemon(state, state.parent / "pool", *ASK, *flags)


def names(state: Path) -> list[str]:
    with State.open(state) as opened:
        assert verify(opened) == []
        return [c.entry.candidate.name for c in opened.ledger.folds()]


def test_a_round_runs_when_enough_wait_and_survives_a_kill(tmp_path: Path, base: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "daemon.log"
    making.init(base, state, making.Recipe(rule="mean"))
    flags = ("--select", "relevance", "--round", "size=3", "--round", "wait=9999")
    quadratic.good(base, 0)
    quadratic.noise(base, 0)
    with running(state, *flags) as process:
        address = url(process, state)
        body = until(lambda: status(address) if status(address)["pool_size"] == 2 else None, "two wait")
        assert (body["select"], body["folds"], body["last_round"]) == ("relevance", 0, None)
        assert {row["model"] for row in body["pool"]} == {"good0", "noise0"}
        page = get(f"{address}/")[1]
        for words in ("Pool (relevance)", "No round yet", "waits for its first round"):
            assert words in page
        until(lambda: "continual_pool_candidates 2.0" in get(f"{address}/metrics")[1], "the metrics have them")
        assert "continual_rounds_total 0.0" in get(f"{address}/metrics")[1]
        quadratic.good(base, 1)
        body = until(lambda: status(address) if status(address)["last_round"] else None, "the third makes a round due")
        until(lambda: status(address)["folds"] == 2, "what it chose is folded")
        until(lambda: "continual_rounds_total 1.0" in get(f"{address}/metrics")[1], "the round is counted")
        body = status(address)
        assert body["last_round"]["loss"] < body["last_round"]["before"]
        assert (body["pool_size"], body["pool"][0]["model"], body["pool"][0]["rounds"]) == (1, "noise0", 1)
        until(lambda: "continual_pool_candidates 1.0" in get(f"{address}/metrics")[1], "the metrics have who is left")
        metrics = get(f"{address}/metrics")[1]
        for words in ("continual_folds_total 2.0", "continual_round_seconds_count 1.0"):
            assert words in metrics
        assert (
            float(next(line.split()[1] for line in metrics.splitlines() if line.startswith("continual_round_loss ")))
            > 0
        )
        page = get(f"{address}/")[1]
        assert "Last round" in page
        assert "not relevant to the merge as it is" in page
        quadratic.noise(base, 1)
        quadratic.noise(base, 2)
        until(lambda: status(address)["pool_size"] == 3, "two more wait")
        assert status(address)["last_round"]["seq"] == body["last_round"]["seq"], "two new ones are not enough"
        quadratic.good(base, 2)
        records = state / "commits"
        until(lambda: '"kind":"round"' in max(records.iterdir()).read_text(), "another round has begun")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with running(state, *flags) as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 3, "the round is taken up and ended")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    assert sorted(names(state)) == ["good0", "good1", "good2"]
    with State.open(state) as opened:
        assert opened.ledger.open_round is None
        assert {w.candidate.name for w in opened.ledger.pool.values()} == {
            "noise0",
            "noise1",
            "noise2",
        }
        rounds = [c.entry for c in opened.ledger.log if isinstance(c.entry, RoundEntry)]
        assert [r.asked for r in rounds] == [rounds[0].asked] * len(rounds)
    assert "Traceback" not in log.read_text()


def test_the_oldest_does_not_wait_for_company_for_ever(tmp_path: Path, base: Path) -> None:
    """A merge that is weighed; and a folder that goes away in between ends in another try."""
    state, link = tmp_path / "state", tmp_path / "published/current"
    making.init(base, state, making.Recipe(rule="frank-wolfe"))
    with running(state, "--round", "size=99", "--round", "wait=1.5", "--current", str(link)) as process:
        address = url(process, state)
        quadratic.good(base, 0)
        until(lambda: status(address)["folds"] == 1, "it is folded alone, after a while")
        until(link.exists, "and published")
        body: dict[str, Any] = status(address)
        assert (body["select"], body["rule"], body["pool_size"]) == ("frank-wolfe", "frank-wolfe", 0)
        assert 0 < body["last_folds"][0]["weight"] <= 4
        assert process.poll() is None
    assert names(state) == ["good0"]


def test_a_round_that_nobody_is_left_for_is_no_reason_to_stop(tmp_path: Path, base: Path) -> None:
    """It was cut off, and its only member was folded by hand since."""
    state = tmp_path / "state"
    making.init(base, state, making.Recipe(rule="mean"))
    asked: dict[str, Any] = {"objective": "tests.helpers.quadratic:make", "max_base_ratio": 10, "write": True}
    with api.open(state, select="relevance", **asked) as merge:
        merge.fold(quadratic.good(base, 0))
        merge.engine.resources.stop.set()
        with pytest.raises(Abandoned):
            merge.round()
        assert merge.state.ledger.open_round is not None
    with api.open(state, select="none", **asked) as merge:
        assert merge.fold(base.parent / "pool/good0").fate == "folded"
        assert (merge.pool(), merge.state.ledger.open_round is None) == ({}, False)
    with running(state, "--select", "relevance", "--round", "size=1") as process:
        address = url(process, state)
        until(lambda: get(f"{address}/readyz")[0] == 200, "it has looked around")
        quadratic.good(base, 1)
        until(lambda: status(address)["folds"] == 2, "it goes on")
        assert process.poll() is None


def test_what_rounds_need_is_said_at_the_start(tmp_path: Path, base: Path) -> None:
    state = tmp_path / "state"
    making.init(base, state, making.Recipe(rule="mean"))
    with daemon(state, tmp_path / "pool", "--select", "relevance") as process:
        assert process.wait(LIMIT) == 2
    with daemon(state, tmp_path / "pool", "--select", "relevance", "--objective", "no.such:make") as process:
        assert process.wait(LIMIT) == 2
    log = (tmp_path / "daemon.log").read_text()
    assert "objective: rounds need to know what is good" in log
    assert "no.such:make" in log
    assert "Traceback" not in log
