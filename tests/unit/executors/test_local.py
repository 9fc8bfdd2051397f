"""What only the local executor promises: its defaults, from the machine it runs on. The rest is in `test_contract`."""

from __future__ import annotations

import os

from continual.executors.local import Local, available_memory


def test_it_takes_the_cores_of_this_process_and_half_of_what_is_free() -> None:
    executor = Local()
    assert executor.workers == len(os.sched_getaffinity(0))
    assert 1 << 27 <= executor.budget <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_there_is_always_some_memory() -> None:
    assert available_memory() >= 1 << 28
