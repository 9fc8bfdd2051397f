"""Exceptions that nobody expected, wherever the daemon works: none ends it, each is told of and counted, and a
candidate at which one is raised again and again is refused. What raises is a gate, a source, an objective of somebody
else."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import structlog

from continual import gates, making, retrying
from continual.api import Merge
from continual.config import Settings
from continual.errors import Damaged, Retry
from continual.gates.contract import AtHeaders, AtNumbers, Headers, Numbers
from continual.records import Event
from continual.service import logs, once
from continual.sources.contract import Source
from continual.sources.folder import FolderSource
from tests.helpers import models, quadratic, running
from tests.helpers.services import get, status, until

pytestmark = pytest.mark.slow


class Panic(BaseException):
    """As a library in Rust raises it."""


def burst(depth: int = 0) -> int:
    return burst(depth + 1)


def fault(name: str) -> None:
    """What is wrong with a candidate of this name."""
    if name.startswith("deep"):
        burst()
    if name.startswith("large"):
        raise MemoryError
    if name.startswith("quits"):
        sys.exit(99)
    if name.startswith("panics"):
        raise Panic("unwrap on None")
    if name.startswith("stops"):
        raise StopIteration


@dataclass(frozen=True)
class EarlyGate(AtHeaders):
    """Fails at headers."""

    name = "early"
    reasons = ()

    def judge(self, seen: Headers) -> None:
        fault(seen.candidate.name)


@dataclass(frozen=True)
class LateGate(AtNumbers):
    """Fails when a generation has been written."""

    name = "late"
    reasons = ()

    def judge(self, seen: Numbers) -> None:
        fault(seen.name.removeprefix("late-"))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(gates, "make", partial(gates.make, kinds=(*gates.GATES, EarlyGate, LateGate)))
    monkeypatch.setattr(retrying, "FIRST_RETRY", 0.05)
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    (tmp_path / "in").mkdir()
    return Settings(state=tmp_path / "state", watch=(tmp_path / "in",), port=0, settle=0.05, log_json=True)


def publish(tmp_path: Path, *names: str) -> None:
    for name in names:
        models.fine_tune(tmp_path / "base", tmp_path / "in" / name, seed=sum(name.encode()))


def counted(address: str, series: str) -> float:
    lines = get(f"{address}/metrics")[1].splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(series)))


BAD = ("deep", "large", "quits", "panics", "stops", "late-deep", "late-large", "late-panics")


def test_a_candidate_that_breaks_the_code_is_refused_after_three_tries_and_the_others_are_folded(
    tmp_path: Path, settings: Settings
) -> None:
    publish(tmp_path, *BAD, "good")

    def visit(address: str) -> None:
        until(lambda: status(address)["head"] == len(BAD) + 1, "every candidate has a fate")
        assert status(address)["folds"] == 1
        until(lambda: counted(address, 'continual_refusals_total{reason="internal"}') == len(BAD), "all are counted")
        assert counted(address, 'continual_errors_total{kind="internal"}') == 3 * len(BAD)
        assert get(f"{address}/healthz")[0] == 200

    with Merge(settings, write=True) as merge:
        daemon = running.made(merge)
        running.until(daemon, visit)
        assert daemon.halted is None
        refused = {c.entry.candidate.name: c.entry for c in merge.state.ledger.refusals if c.entry.candidate}
        assert refused.keys() == set(BAD)
        assert {entry.reason for entry in refused.values()} == {"internal"}
        for name, words in (("late-deep", "RecursionError"), ("large", "MemoryError"), ("panics", "Panic: unwrap")):
            assert words in (refused[name].message or ""), name
        assert "continual retry" in (refused["quits"].message or "")
        assert len(list((tmp_path / "state/generations").iterdir())) == 1, "what they had written is gone"

    def again(address: str) -> None:
        publish(tmp_path, "later")
        until(lambda: status(address)["folds"] == 2, "the next one is folded")
        assert status(address)["head"] == len(BAD) + 2, "their fate is settled"
        assert counted(address, 'continual_errors_total{kind="internal"}') == 0

    with Merge(settings, write=True) as merge:
        running.until(running.made(merge), again)
        assert len(merge.retry("deep")) == 1


def test_one_look_settles_them_too(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "FIRST_WAIT", 0.01)
    logs.configure(json=True)
    publish(tmp_path, "deep", "good", "late-panics")
    settings = settings.model_copy(update={"settle": 0.0})
    with Merge(settings, write=True) as merge:
        tried = {found.model: found for found in once.once(merge, once.watched(merge))}
        fates = {name: found.outcome and found.outcome.reason for name, found in tried.items()}
        assert fates == {"good": None, "deep": "internal", "late-panics": "internal"}
        seen = {found.model: found for found in once.survey(merge, once.watched(merge))}
        assert not seen["deep"].take
        publish(tmp_path, "deeper")
        seen = {found.model: found for found in once.survey(merge, once.watched(merge))}
        assert (seen["deeper"].take, "RecursionError" in seen["deeper"].why) == (False, True)
    structlog.reset_defaults()


class FlakySource(Source):
    """Ends by itself, then raises, then gives what is there; asked for its series it raises."""

    name = "flaky"
    parks = False

    def __init__(self, origin: Path) -> None:
        self.scanned = asyncio.Event()
        self.problem: str | None = None
        self.origin = origin
        self.begun = 0

    async def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        self.begun += 1
        if self.begun == 1:
            return
        if self.begun == 2:
            raise re_error
        yield Event("folder", str(self.origin), (1, self.origin.name))
        self.problem = None
        await stop.wait()

    def ready(self) -> list[Event]:
        return []

    def series(self) -> dict[str, float]:
        raise ZeroDivisionError("no clock")


re_error = ValueError("\x1b]0;owned\x07")


def test_a_source_that_ends_or_raises_is_started_again_and_the_heart_beats_on(
    tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path, "good")
    source = FlakySource(tmp_path / "in/good")

    def visit(address: str) -> None:
        until(lambda: status(address)["folds"] == 1, "what it gives is folded")
        assert counted(address, 'continual_errors_total{kind="source"}') == 2
        until(lambda: counted(address, 'continual_errors_total{kind="internal"}') >= 1, "the heartbeat is told of")
        assert get(f"{address}/healthz")[0] == 200

    with Merge(settings, write=True) as merge:
        daemon = running.made(merge, [source])
        running.until(daemon, visit)
        assert daemon.halted is None
    assert source.begun == 3
    assert "\x1b]0;" not in capsys.readouterr().err


class GoneSource(FlakySource):
    """What it gives has vanished; the file system takes its time to say so."""

    def __init__(self, origin: Path) -> None:
        super().__init__(origin)
        self.scanned.set()
        self.begun = 2
        self.asked_on: list[str] = []
        self.heard: list[str | None] = []

    def is_gone(self, _event: Event) -> bool:
        self.asked_on.append(threading.current_thread().name)
        return True

    def settled(self, _event: Event, key: str | None) -> None:
        self.heard.append(key)


def test_a_file_system_is_not_asked_on_the_event_loop_and_the_source_hears_of_what_vanished(
    tmp_path: Path, settings: Settings
) -> None:
    source = GoneSource(tmp_path / "in/good")
    with Merge(settings, write=True) as merge:
        running.until(running.made(merge, [source]), lambda _: until(lambda: source.heard, "it hears"))
    assert source.heard == [None]
    assert len(source.asked_on) == 1
    assert source.asked_on[0].startswith("engine")


def test_what_changes_while_it_is_folded_is_looked_at_again(tmp_path: Path, settings: Settings) -> None:
    source = GoneSource(tmp_path / "in/good")
    folder = Event("folder", str(source.origin), (1, "good"), tmp_path / "in")
    repo = Event("hub", "hf://org/ft", (1, ""), None, "0" * 40)
    with Merge(settings, write=True) as merge:
        daemon = running.made(merge, [source])
        daemon._socket.close()  # nothing runs
        worker = daemon._worker
        for folded, came, waits in (
            (folder, folder, False),
            (folder, replace(folder, order=(2, "good")), True),
            (repo, replace(repo, order=(2, "")), False),
        ):
            worker.live.begin(folded)
            worker.put(came, source)
            assert [queued.event for queued in worker.queue.waiting.values()] == [came] * waits
            worker.queue.waiting.clear()


class DamagedSource(FlakySource):
    """Finds the state damaged."""

    async def events(self, _stop: asyncio.Event) -> AsyncIterator[Event]:
        yield Event("folder", str(self.origin), (1, self.origin.name))
        raise Damaged("the inbox is altered")


def test_damage_of_the_state_halts(tmp_path: Path, settings: Settings) -> None:
    publish(tmp_path, "good")
    with Merge(settings, write=True) as merge:
        daemon = running.made(merge, [DamagedSource(tmp_path / "in/good")])
        asyncio.run(daemon.run())
        assert "altered" in str(daemon.halted)


def test_a_fold_stands_though_what_comes_after_its_commit_fails(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "good")
    with Merge(settings, write=True) as merge:

        def visit(address: str) -> None:
            until(lambda: "continual_folds_total 1.0" in get(f"{address}/metrics")[1], "it is told as a fold")
            assert status(address)["queued"] == 0

        def full(_keep: int) -> list[str]:
            raise Retry("the disk is full; nothing was settled")

        monkeypatch.setattr(merge.state, "expire", full)
        running.until(running.made(merge, [FolderSource(tmp_path / "in", settle=0.05)]), visit)
        assert [commit.entry.candidate.name for commit in merge.state.ledger.folds()] == ["good"]


def test_a_round_that_raises_is_tried_again_and_the_daemon_folds_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "FIRST_RETRY", 0.05)
    base = quadratic.world(tmp_path)
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    quadratic.good(base, 0)
    settings = Settings.model_validate(
        {
            "state": tmp_path / "state",
            "watch": [tmp_path / "pool"],
            "settle": 0.05,
            "select": "relevance",
            "objective": "tests.helpers.quadratic:quits",
            "rounds": {"size": 1},
            "max_base_ratio": 10,
        }
    )

    def visit(address: str) -> None:
        until(lambda: counted(address, 'continual_errors_total{kind="internal"}') >= 2, "the round is tried again")
        assert get(f"{address}/healthz")[0] == 200

    with Merge(settings, write=True) as merge:
        daemon = running.made(merge)
        running.until(daemon, visit)
        assert daemon.halted is None
        assert len(merge.pool()) == 1
