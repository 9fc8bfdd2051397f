"""The local executor: how much runs at once, in which order it begins, and what an error leaves running."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.executors.contract import Task
from continual.executors.local import Local


class Meter:
    """Sums what runs at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = self.most = self.used = self.highest = 0

    def work(self, need: int) -> int:
        with self.lock:
            self.running, self.used = self.running + 1, self.used + need
            self.most, self.highest = max(self.most, self.running), max(self.highest, self.used)
        time.sleep(0.001)
        with self.lock:
            self.running, self.used = self.running - 1, self.used - need
        return need


@given(needs=st.lists(st.integers(1, 150), max_size=12), workers=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_within_workers_and_budget_unless_one_alone_is_larger(needs: list[int], workers: int) -> None:
    meter = Meter()
    tasks = [Task(str(i), need, partial(meter.work, need)) for i, need in enumerate(needs)]
    found = dict(Local(workers, 100).map(tasks))
    assert found == {str(i): need for i, need in enumerate(needs)}
    assert meter.most <= workers
    assert meter.highest <= max([100, *needs])


def test_an_error_is_raised_once_nothing_runs_and_stops_what_has_not_begun() -> None:
    begun: list[int] = []
    done: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("first")
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(ValueError, match="first"):
        list(Local(2, 1 << 30).map([Task(str(i), 1, partial(work, i)) for i in range(50)]))
    assert sorted(begun) == sorted([0, *done]), "what began was waited for"
    assert len(begun) < 50


def test_the_next_is_prefetched_while_one_runs() -> None:
    asked: list[str] = []
    tasks = [Task(str(i), 1, lambda: None, partial(asked.append, str(i))) for i in range(3)]
    list(Local(1, 10).map(tasks))
    assert asked == ["1", "2"]
