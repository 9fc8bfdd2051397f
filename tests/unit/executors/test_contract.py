"""What every executor keeps to, wherever its tasks run. A second executor joins by a row in `EXECUTORS`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from continual.executors.contract import Executor, Task
from continual.executors.local import Local

EXECUTORS: dict[str, Callable[[int, int], Executor]] = {"local": Local}
"""How each executor is made, for so many workers and so many bytes."""
MANY = 1 << 40
UNTIL = 60.0
"""Seconds after which a task that waits for another gives up: then the test fails."""

Make = Callable[[int, int], Executor]


@pytest.fixture(params=EXECUTORS)
def make(request: pytest.FixtureRequest) -> Make:
    return EXECUTORS[request.param]


class Meter:
    """Counts what runs at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: list[int] = []
        self.together: list[tuple[int, ...]] = []

    def work(self, need: int) -> int:
        with self.lock:
            self.running.append(need)
            self.together.append(tuple(self.running))
        time.sleep(0.001)
        with self.lock:
            self.running.remove(need)
        return need


@given(needs=st.lists(st.integers(1, 150), max_size=12), workers=st.integers(1, 4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_within_workers_and_budget_and_one_that_is_too_large_runs_alone(
    make: Make, needs: list[int], workers: int
) -> None:
    meter = Meter()
    executor = make(workers, 100)
    assert (executor.workers, executor.budget) == (workers, 100)
    found = dict(executor.map([Task(str(i), need, partial(meter.work, need)) for i, need in enumerate(needs)]))
    assert found == {str(i): need for i, need in enumerate(needs)}
    for together in meter.together:
        assert len(together) <= workers
        assert sum(together) <= 100 or len(together) == 1


def test_as_many_run_at_a_time_as_there_are_workers(make: Make) -> None:
    """Each task waits until all three have begun: with fewer at a time none would end."""
    together = threading.Barrier(3, timeout=UNTIL)
    found = list(make(3, MANY).map([Task(str(i), 1, together.wait) for i in range(3)]))
    assert sorted(name for name, _ in found) == ["0", "1", "2"]


def test_tasks_begin_in_the_order_in_which_they_are_given(make: Make) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with lock:
            begun.append(number)

    list(make(1, MANY).map([Task(str(i), 1, partial(work, i)) for i in range(20)]))
    assert begun == list(range(20))


def test_a_result_is_there_as_soon_as_its_task_has_ended(make: Make) -> None:
    """The caller lets the second task go on once it has the result of the first."""
    first_is_known = threading.Event()
    tasks = [Task("first", 1, lambda: True), Task("second", 1, partial(first_is_known.wait, UNTIL))]
    results = make(2, MANY).map(tasks)
    assert next(results) == ("first", True)
    first_is_known.set()
    assert list(results) == [("second", True)]


def test_an_error_is_raised_after_the_rest_has_ended_and_stops_what_has_not_begun(make: Make) -> None:
    begun: list[int] = []
    done: list[int] = []
    other_began = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            assert other_began.wait(UNTIL)
            raise ValueError("first")
        other_began.set()
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(ValueError, match="first"):
        list(make(2, MANY).map([Task(str(i), 1, partial(work, i)) for i in range(50)]))
    assert done, "another was running when the first failed"
    assert sorted(begun) == sorted([0, *done]), "what had begun ended before the error was raised"
    assert len(begun) < 50


def test_torch_has_one_thread_inside_a_task(make: Make) -> None:
    """The bits of a result must not depend on how many threads torch takes; and the caller keeps its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(2, timeout=UNTIL)

        def threads() -> int:
            together.wait()
            return torch.get_num_threads()

        assert [found for _, found in make(2, MANY).map([Task(str(i), 1, threads) for i in range(2)])] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_next_is_prefetched_while_one_runs(make: Make) -> None:
    """Each task waits until the input of the next was asked for."""
    asked = [threading.Event() for _ in range(4)]

    def work(number: int) -> bool:
        return number == 3 or asked[number + 1].wait(UNTIL)

    tasks = [Task(str(i), 1, partial(work, i), asked[i].set) for i in range(4)]
    assert all(found for _, found in make(1, MANY).map(tasks))


def test_nothing_to_do(make: Make) -> None:
    assert list(make(2, MANY).map([])) == []


def test_an_executor_can_be_used_again(make: Make) -> None:
    executor = make(2, MANY)
    for _ in range(2):
        assert dict(executor.map([Task(str(i), 1, partial(int, i)) for i in range(3)])) == {"0": 0, "1": 1, "2": 2}
