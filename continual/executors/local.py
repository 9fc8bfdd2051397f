"""Tensors on threads of this process, under a memory budget. Nothing here knows what the work is."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from continual.executors.contract import Task

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Local:
    """A bounded pool of worker threads.

    At most `workers` tasks run at once and their needs add up to at most `budget` bytes; a task that needs more than
    the whole budget runs alone. Each worker keeps torch at one thread, so that the bits of a result do not depend on
    how many workers there are.
    """

    def __init__(self, workers: int = 0, budget: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.budget = budget or available_memory() // 2
        give_back_large_blocks()

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Results as (name, result) in the order they finish. The first error stops what has not begun and is raised
        once the rest is done."""
        with ThreadPoolExecutor(self.workers, "fold", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from self._drive(pool, tasks)

    def _drive(self, pool: ThreadPoolExecutor, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        running: dict[Future[T], Task[T]] = {}
        used = 0
        position = 0
        try:
            while running or position < len(tasks):
                while position < len(tasks) and len(running) < self.workers:
                    task = tasks[position]
                    if running and used + task.need > self.budget:
                        break
                    position += 1
                    used += task.need
                    running[pool.submit(task.run)] = task
                    _prefetch(tasks[position : position + 1])
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    used -= task.need
                    yield task.name, future.result()
        finally:
            wait(running)


def _prefetch(tasks: Iterable[Task[T]]) -> None:
    for task in tasks:
        if task.prefetch is not None:
            task.prefetch()


def give_back_large_blocks() -> None:
    """Has glibc return blocks of 4 MiB and more to the system when they are freed.

    By default it raises that bound to 32 MiB as they come, and every worker's heap keeps what it once needed: a third
    more at the peak. Smaller blocks are kept, up to 16 MiB a heap: the buffers of a run would otherwise be given back
    and faulted in again at every step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def available_memory() -> int:
    """Bytes this process could still take: what the kernel calls available, or less where a control group sets a limit."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            text = limit.read().strip()
            if text != "max":
                free = min(free, int(text) - int(used.read()))
    except (OSError, ValueError):
        pass  # no control group of version 2 here
    return max(free, 1 << 28)
