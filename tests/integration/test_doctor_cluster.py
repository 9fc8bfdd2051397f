"""`continual doctor` where a cluster does the work: what its machines say, and how it is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from continual.config import Settings
from continual.config.cluster import RaySettings
from continual.executors.asked_machines import MachineLook, PlaceSeen
from continual.service import doctor_cluster
from tests.helpers import command, models, on_cluster
from tests.integration.test_doctor import found


@pytest.fixture
def state(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if on_cluster.WANTED in os.environ:
        on_cluster.address()
        monkeypatch.delenv(on_cluster.WANTED)  # continual takes it for a setting
    command.run("init", models.base(memory / "base"), "--state", memory / "state")
    (memory / "in").mkdir()
    return memory / "state"


def test_machines_of_a_cluster_are_asked_what_they_see(state: Path) -> None:
    address, inside = on_cluster.address(), state.parent / "in"
    models.fine_tune(state.parent / "base", inside / "alice", 1)
    command.run("fold", inside / "alice", "--state", state)
    asked = ("--executor", "ray", "--ray", f"address={address}", "--watch", inside)
    told = found(state, *asked, "--current", state.parent / "current")
    assert told["cluster", "ok"]["told"].startswith(f"{address}: 2 machines alive with 4 cores, 6.44 GB and 0 GPUs")
    assert told["machines", "ok"]["told"] == "all of them: 2 machines with the same software, the same files and room"
    told = found(state, *asked, "--ray", "gpus=1", code=3)
    assert "no machine of the cluster" in told["cluster", "fail"]["told"]


@pytest.mark.parametrize("exports", ["workers", "driver"])
def test_what_machines_do_not_see_is_said_once_for_all_of_them(
    state: Path, exports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        state=state, watch=(state.parent / "in",), current=state.parent / "current", ray=RaySettings(exports=exports)
    )
    seen = MachineLook(
        ((state, "is not there"), (state.parent, "is not there"), (state.parent / "in", "has no alice")),
        temporary="/tmp",
        free=1 << 30,
        whole=1 << 40,
    )
    asked: list[PlaceSeen] = []

    def answers(_link: object, places: Sequence[PlaceSeen], _seconds: float) -> list[tuple[str, MachineLook | str]]:
        asked.extend(places)
        (state.parent / "in" / "new").touch()  # what changed here meanwhile is no machine's fault
        return [("10.0.0.9", "cannot do orders: x"), *((f"10.0.0.{n}", seen) for n in (3, 2, 2))]

    monkeypatch.setattr(doctor_cluster, "ask_machines", answers)
    told = [tuple(one) for one in doctor_cluster._machines(None, settings, None)]  # type: ignore[arg-type]
    assert [str(place.path) for place in asked] == [
        str(state),
        str(state.parent / "base"),
        str(state.parent / "in"),
        *([str(state.parent)] if exports == "workers" else []),
    ]
    assert [file.name for file in asked[1].files] == ["model.safetensors"]
    assert [(level, words.partition(" ")[0]) for _, level, words, _ in told] == [
        ("fail", "10.0.0.9:"),
        ("fail", "10.0.0.2,"),
        ("warn" if exports == "workers" else "fail", "10.0.0.2,"),
        ("warn", "10.0.0.2,"),
    ]
    assert told[1][2:] == (
        f"10.0.0.2, 10.0.0.3: {state} is not there",
        "mount there what this machine has, at the same path",
    )
    assert "/tmp is nearly full: 1.07 GB of 1.1 TB free" in told[3][2]
