"""Memory that tasks use one after the other: what is free is used again, and there is never more than is used at a
time."""

from __future__ import annotations

import pytest

from continual.executors.memory import Memory


def test_parts_are_as_long_as_asked_and_do_not_overlap() -> None:
    with Memory().take([3, 0, 100, 64]) as parts:
        assert [len(part) for part in parts] == [3, 0, 100, 64]
        for number, part in enumerate(parts):
            part.fill(number)
        assert [set(part.tolist()) for part in parts] == [{0}, set(), {2}, {3}]
        first = parts[0].ctypes.data
        assert all((part.ctypes.data - first) % 64 == 0 for part in parts if len(part))


def test_what_is_free_is_used_again_and_the_smallest_that_is_enough() -> None:
    memory = Memory()
    with memory.take([1000]) as (one,), memory.take([100]) as (other,):
        places = {len(part): part.ctypes.data for part in (one, other)}
    with memory.take([90]) as (small,), memory.take([90]) as (large,):
        assert small.ctypes.data == places[100]
        assert large.ctypes.data == places[1000]


def test_a_new_block_takes_the_place_of_the_largest() -> None:
    memory = Memory()
    for size in (100, 10_000, 50, 20_000):
        with memory.take([size]):
            pass
    assert [len(block) for block in memory._free] == [20_032]


def failing(memory: Memory, places: list[int]) -> None:
    with memory.take([64]) as (part,):
        places.append(part.ctypes.data)
        raise ZeroDivisionError


def test_memory_comes_back_where_work_fails() -> None:
    memory, places = Memory(), list[int]()
    with pytest.raises(ZeroDivisionError):
        failing(memory, places)
    with memory.take([64]) as (again,):
        assert again.ctypes.data == places[0]
