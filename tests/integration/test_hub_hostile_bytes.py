"""Bytes of models on a Hub that is hostile, or broken: what is not as the Hub says is neither folded nor believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from continual import making
from continual.errors import Retry
from continual.hub import window, wire
from continual.records import Event
from tests.helpers import adapters, hubs, models
from tests.helpers.hubs import made, merge, publish
from tests.loopback import Hub, faults, hostile, serving
from tests.loopback.routing import Answer

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a minute, a few seconds."""
    monkeypatch.setattr(wire, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("continual.hub.line.next_try", lambda *_: None)


READS: dict[str, Callable[[Answer], Answer]] = {
    "another range": lambda a: replace(
        a, headers={**a.headers, "Content-Range": f"bytes 5-6/{a.headers['Content-Range'].rpartition('/')[2]}"}
    ),
    "no range": lambda a: replace(a, headers={k: v for k, v in a.headers.items() if k != "Content-Range"}),
    "a range of many digits": lambda a: replace(a, headers={**a.headers, "Content-Range": f"bytes 0-1/{'9' * 400}"}),
    "several parts": lambda a: replace(
        a, headers={"Content-Type": "multipart/byteranges; boundary=x"}, body=b"--x\r\n\r\n" + bytes(a.body)
    ),
    "something else": lambda a: replace(a, status=200, headers={}, body=b"<html>a portal</html>"),
    "packed though not asked": lambda a: replace(a, headers={**a.headers, "Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("kind", READS)
def test_ranges_that_are_not_those_asked_for_settle_nothing(tmp_path: Path, hub: Hub, kind: str) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        hub.faults = lambda r: faults.Mangle(READS[kind]) if r.origin == "cdn" else None
        with pytest.raises(Retry):
            ours.fold(Event("hub", "hf://org/ft", (1, ""), None, sha))
        assert ours.state.ledger.head.seq == 0
        hub.faults = lambda r: faults.Mangle(lambda a: replace(a, body=bytes(a.body) + b"more")) if r.range else None
        assert ours.fold(Event("hub", "hf://org/ft", (1, ""), None, sha)).fate == "folded"


def test_another_commit_than_was_asked_for_settles_nothing(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    sha, other = (publish(hub, "org/ft", models.fine_tune(base, tmp_path / f"ft{n}", n)) for n in (1, 2))
    with merge(tmp_path / "state", hub) as ours:
        hub.faults = lambda r: hostile.changed(lambda one: one | {"sha": other}) if sha in r.path else None
        with pytest.raises(Retry, match="the Hub answers with another commit"):
            ours.fold(f"hf://org/ft@{sha}")
        hub.faults = None
        assert ours.fold(f"hf://org/ft@{sha}").fate == "folded"


HEADS = {
    "a page of no length": faults.Raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n" + b"<!DOCTYPE html>" * 20_000
    ),
    "one bit": hostile.flipped(0.0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_beginning_of_a_file_that_is_not_its_own_refuses_nothing(tmp_path: Path, hub: Hub, kind: str) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    event = Event("hub", "hf://org/ft", (1, ""), None, sha)
    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        hub.faults = faults.Times(HEADS[kind], 1, origin="cdn")
        with pytest.raises(Retry, match=r"something else than the file|came with other bytes than before"):
            ours.fold(event)
        hub.faults = None
        assert ours.fold(event).fate == "folded"


def test_a_file_of_another_size_is_refused(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))

    def larger(one: Any) -> None:
        for file in one["siblings"]:
            if "lfs" in file:
                file["size"] = file["lfs"]["size"] = 1 << 49

    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        hub.faults = hostile.at("/api/models/org/ft", hostile.changed(larger))
        outcome = ours.fold(Event("hub", "hf://org/ft", (1, ""), None, sha))
        assert (outcome.fate, outcome.reason) == ("refused", "changed"), outcome.message


@pytest.mark.parametrize("rule", ["task-arithmetic", "ties", "iso-c"])
def test_one_bit_of_a_tensor_that_changed_on_its_way_is_not_folded(tmp_path: Path, hub: Hub, rule: str) -> None:
    base = made(tmp_path, hub, rule)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    event = Event("hub", "hf://org/ft", (1, ""), None, sha)
    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        hub.faults = faults.Times(hostile.flipped(), 1, origin="cdn", skip=1)  # the first has the header
        with pytest.raises(Retry, match=r"damaged on its way|other bytes"):
            ours.fold(event)
        assert ours.state.ledger.head.seq == 0
        assert len(ours.state.generations()) == 0
        hub.faults = None
        assert ours.fold(event).fate == "folded"


def test_one_bit_of_a_factor_that_changed_on_its_way_is_not_folded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a state of adapters nothing but factors is read, by several threads."""
    monkeypatch.setattr(window, "HEAD", 2048)
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state", making.Recipe("task-arithmetic", width=8))
    tune = adapters.lora(tmp_path / "ft", base, 1, rank=6, modules=("q_proj", "up_proj", "down_proj"))
    publish(hub, "org/ft", tune)
    with merge(tmp_path / "state", hub, workers=2) as ours:
        hub.faults = faults.Times(hostile.flipped(), 1, origin="cdn", skip=1)  # the first has the header
        with pytest.raises(Retry, match=r"damaged on its way|other bytes"):
            ours.fold("hf://org/ft")
        hub.faults = None
        assert ours.fold("hf://org/ft").fate == "folded"


def test_bytes_that_the_hub_itself_has_wrong_are_refused_before_the_commit(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    blob = hub.repo("org/ft").commits[sha].files["model.safetensors"]
    stored = bytearray(hub.objects[blob.sha256])
    stored[-3] ^= 1
    hub.objects[blob.sha256] = bytes(stored)
    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        outcome = ours.fold(Event("hub", "hf://org/ft", (1, ""), None, sha))
        assert (outcome.fate, outcome.reason) == ("refused", "changed"), outcome.message
        assert len(ours.state.generations()) == 0


def test_a_configuration_that_was_damaged_is_not_believed(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", hubs.adapter(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub) as ours:
        hub.faults = lambda r: hostile.flipped() if r.path.endswith("adapter_config.json") else None
        outcome = ours.fold("hf://org/ft")
        assert (outcome.fate, outcome.reason) == ("refused", "changed"), outcome.message


def test_a_shard_that_is_no_file_of_the_repo_is_missing(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    shards = hubs.sharded(models.fine_tune(base, tmp_path / "whole", 1), tmp_path / "sharded")
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../model.safetensors")
    publish(hub, "org/out", shards)
    hub.commit("org/out", {"model.safetensors.index.json": json.dumps(index).encode()})
    publish(hub, "org/lacks", shards)
    hub.commit("org/lacks", {"model-00002-of-00003.safetensors": None})
    hub.commit("org/lacks", {"Model-00002-of-00003.safetensors": b"x" * 20})
    with merge(tmp_path / "state", hub) as ours:
        assert ours.fold("hf://org/out").reason == "index"
        assert ours.fold("hf://org/lacks").reason == "missing-shard"
