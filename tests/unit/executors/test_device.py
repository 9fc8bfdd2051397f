"""Turns at an accelerator: how many at a time, how much memory, and what comes of work that takes too much."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from continual.errors import Halt, Retry
from continual.executors import device
from continual.executors.device import Lanes, pick_device, turn


def most_at_once(room: int, lanes: int, needs: list[int]) -> tuple[int, int]:
    """The most tasks, and the most memory, that were under way at a time."""
    taken, lock = Lanes(room, list(range(lanes))), threading.Lock()
    now, tasks, memory = list[int](), 0, 0

    def work(nbytes: int) -> None:
        nonlocal tasks, memory
        with taken.take(nbytes) as lane:
            assert lane is not None
            with lock:
                now.append(nbytes)
                tasks, memory = max(tasks, len(now)), max(memory, sum(now))
            threading.Event().wait(0.01)
            with lock:
                now.remove(nbytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, needs))
    return tasks, memory


def test_as_many_as_there_are_lanes_compute_at_a_time() -> None:
    assert most_at_once(1000, 3, [1] * 16)[0] == 3


def test_what_computes_at_a_time_fits_in_the_room() -> None:
    tasks, memory = most_at_once(100, 4, [60, 40, 30, 60, 50, 40] * 3)
    assert tasks > 1
    assert memory <= 100


def test_what_never_fits_gets_no_lane_and_waits_for_nobody() -> None:
    taken = Lanes(100, ["a lane"])
    with taken.take(100) as first, taken.take(101) as second:
        assert (first, second) == ("a lane", None)


def test_a_lane_comes_back_when_the_work_fails() -> None:
    taken = Lanes(100, ["a lane"])
    with pytest.raises(ZeroDivisionError), taken.take(100):
        raise ZeroDivisionError
    with taken.take(100) as lane:
        assert lane == "a lane"


def test_the_cpu_has_no_turns() -> None:
    with turn(torch.device("cpu"), 1 << 60) as first, turn(torch.device("cpu"), 1 << 60) as second:
        assert first == second == pick_device("cpu")


class Failed(RuntimeError):
    """As torch's own, whose arguments differ between versions."""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Retry, "cuda:1 has no memory left"),
        (Failed("CUDA error: unspecified launch failure\nmore"), Halt, "cuda:1 failed (CUDA error: unspecified "),
    ],
)
def test_what_an_accelerator_says_is_said_in_words(
    error: Exception, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "AcceleratorError", Failed, raising=False)
    with pytest.raises(kind) as found, device._in_words(torch.device("cuda:1")):
        raise error
    assert said in str(found.value)
