"""The clock of stages: each moment counts once, threads are added up, and nothing is kept where nobody asks."""

from __future__ import annotations

import pytest

from continual.executors.contract import Task
from continual.executors.local import Local
from continual.timing.clock import STAGES, WAITING, Spent, profiled, stage


def _work(nbytes: int) -> int:
    with stage("read", nbytes):
        total = sum(range(20_000))
        with stage("hash", 2 * nbytes):
            total += sum(range(20_000))
        total += sum(range(20_000))
    return total


def test_each_moment_goes_to_the_innermost_stage() -> None:
    with profiled() as profile:
        _work(5)
    (track,) = profile.tracks
    assert {name: spent.nbytes for name, spent in track.spent.items()} == {"other": 0, "read": 5, "hash": 10}
    assert all(spent.seconds > 0.0 for spent in track.spent.values())
    assert 0.0 < sum(spent.seconds for spent in track.spent.values()) <= profile.seconds


def test_a_stage_ends_where_an_error_leaves_it() -> None:
    with profiled() as profile:
        with pytest.raises(ZeroDivisionError), stage("write"):
            _ = 1 // 0
        with stage("open", 1):
            pass
    assert list(profile.tracks[0].spent) == ["other", "write", "open"]


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_on_any_thread_are_added_up_by_name(workers: int) -> None:
    tasks = [Task(name, 1, lambda: _work(1)) for name in ("a", "b", "c", "a")]
    with profiled() as profile:
        list(Local(workers).map(tasks))
    assert sorted(track.name for track in profile.tracks) == ["", "a", "a", "b", "c"]
    assert {name: stages["hash"].nbytes for name, stages in profile.tensors.items()} == {"a": 4, "b": 2, "c": 2}
    stages = profile.stages
    assert list(stages) == list(STAGES)
    assert (stages["read"].nbytes, stages["hash"].nbytes) == (4, 8)
    assert stages["compute"].cpu_seconds > 0.0
    assert sum(spent.cpu_seconds for spent in stages.values()) == pytest.approx(profile.cpu_seconds, abs=0.05)
    waited = [track.spent[WAITING].seconds for track in profile.tracks if not track.name]
    assert 0.0 < waited[0] < profile.seconds


def test_nothing_is_kept_where_nobody_asks() -> None:
    with profiled() as profile:
        pass
    list(Local(2).map([Task("a", 1, lambda: _work(1))]))
    assert [(track.name, list(track.spent)) for track in profile.tracks] == [("", ["other"])]
    assert profile.stages["read"] == Spent()
