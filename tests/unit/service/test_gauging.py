"""What is measured beside the folds, and what of it a restart keeps."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from continual import making
from continual.api import Merge
from continual.config import Settings, load
from continual.service import gauging
from continual.service.failures import Failures
from continual.service.metrics import Metrics
from continual.service.queue import Queue
from continual.service.status import Live
from continual.sources.cursor import Cursor
from continual.state import usage
from continual.state.entries import SelectEntry
from continual.state.format import Commit
from tests.helpers import models
from tests.helpers.entries import select


def commit(seq: int, time: str, entry: SelectEntry) -> Commit:
    return Commit(seq=seq, prev=None, crc="", generation=None, receipts=None, time=time, entry=entry)


def test_when_a_model_was_folded_last_is_known_after_a_restart_and_a_refusal(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    settings = Settings(state=tmp_path / "state")
    with Merge(settings, write=True) as merge:
        assert gauging.last_times(merge.state.ledger.log) == (None, None)
        models.fine_tune(base, tmp_path / "alice", 1)
        merge.fold(tmp_path / "alice")
        folded = merge.state.ledger.head.time
        models.fine_tune(base, tmp_path / "bob", 1)
        assert merge.fold(tmp_path / "bob").fate == "duplicate"
    with Merge(settings) as again:
        when, round_ = gauging.last_times(again.state.ledger.log)
        assert again.state.ledger.head.seq == 2
    assert (when, round_) == (gauging.seconds(folded), None)
    metrics = Metrics()
    metrics.last(when, round_)
    assert metrics.registry.get_sample_value("continual_last_fold_timestamp_seconds") == when
    assert "continual_last_round_timestamp" not in metrics.text().decode()


def test_a_round_that_brings_nobody_is_no_fold() -> None:
    idle = dataclasses.replace(select(), folds=None)
    log = [commit(1, "2026-01-01T00:00:00Z", idle), commit(2, "2026-01-01T00:01:00Z", idle)]
    assert gauging.last_times(log) == (None, gauging.seconds("2026-01-01T00:01:00Z"))


def test_the_time_of_the_last_poll_is_kept_with_the_cursor() -> None:
    cursor = Cursor(asked="a", polled=12.5)
    assert Cursor.of(cursor.body(), "a").polled == Cursor.of(cursor.body(), "other settings").polled == 12.5
    earlier = {key: value for key, value in cursor.body().items() if key != "polled"}
    assert Cursor.of(earlier, "a").polled is None


def test_the_memory_of_a_device_is_asked_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gauging.device_memory(torch.device("cpu")) is None
    assert gauging.device_memory(torch.device("mps")) is None, "its module does not say it"
    card = SimpleNamespace(mem_get_info=lambda _: (30, 100), memory_reserved=lambda _: 7)
    monkeypatch.setattr(torch, "get_device_module", lambda _: card)
    assert gauging.device_memory(torch.device("cuda:1")) == {"used": 70, "free": 30, "reserved": 7}


def test_features_are_those_that_the_settings_use(tmp_path: Path) -> None:
    assert gauging.in_use(Settings(), "none") == []
    file = tmp_path / "continual.toml"
    file.write_text('current = "x"\n[release]\nrepo = "a/b"\n[release.canary]\nquery = "up"\nmax = 1\n')
    assert gauging.in_use(load({}, file=file, environ={}), "relevance") == ["rounds", "publish", "release", "canary"]
    file.write_text('[views.v]\nrepo = "a/b"\n')
    assert gauging.in_use(load({}, file=file, environ={}), "none") == ["release"]


def test_a_file_of_several_generations_takes_its_room_once(tmp_path: Path) -> None:
    for name in ("generations/1/a", "generations/1/b", "generations/2/b", "commits/0", "HEAD", "lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 5000)
    before = usage.by_kind(tmp_path)
    assert before["generations"] == 3 * before["other"] > 3 * 5000
    assert before["ledger"] == 2 * before["other"]
    os.link(tmp_path / "generations/1/a", tmp_path / "generations/2/a")
    (tmp_path / "generations/2/gone").symlink_to(tmp_path / "nowhere")
    assert usage.by_kind(tmp_path)["generations"] == before["generations"]


def test_what_a_device_raises_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    looks = []

    def broken(device: torch.device) -> None:
        looks.append(device)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gauging, "device_memory", broken)
    monkeypatch.setattr(gauging, "_ROOM", 0.0)

    async def run(merge: Merge) -> Metrics:
        live = Live(merge, Queue())
        failures = Failures(Metrics(), live.health)
        task = asyncio.create_task(gauging.measure(merge, live, failures))
        while len(looks) < 3 and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        return failures.metrics

    with Merge(Settings(state=tmp_path / "state")) as merge:
        metrics = asyncio.run(run(merge))
    assert (metrics.registry.get_sample_value("continual_errors_total", {"kind": "internal"}) or 0) >= 2
    assert (metrics.registry.get_sample_value("continual_disk_free_bytes") or 0) > 0
