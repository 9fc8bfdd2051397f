"""Tensors on threads of this process, under a memory budget. Nothing here knows what the work is."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from continual.executors.contract import Task
from continual.lazily import torch
from continual.timing import clock

T = TypeVar("T")
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""What <malloc.h> of glibc calls these two numbers, without the leading underscore."""


class Local:
    """An executor of threads in this process.

    It changes how glibc manages memory, for the whole process: see `give_back_large_blocks`.
    """

    elsewhere = None

    def __init__(self, workers: int = 0, budget: int | None = None) -> None:
        """`workers` 0 takes one for each core of this process, `budget` None half of the memory that is free now."""
        self.workers = workers or len(os.sched_getaffinity(0))
        self.budget = budget or available_memory() // 2
        give_back_large_blocks()

    def map(self, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        """Runs the tasks, as `Executor` says."""
        with ThreadPoolExecutor(self.workers, "fold", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from self._drive(pool, tasks)

    def _drive(self, pool: ThreadPoolExecutor, tasks: Sequence[Task[T]]) -> Iterator[tuple[str, T]]:
        running: dict[Future[T], Task[T]] = {}
        used = 0
        index = 0
        try:
            while running or index < len(tasks):
                while index < len(tasks) and len(running) < self.workers:
                    task = tasks[index]
                    if running and used + task.need > self.budget:
                        break
                    index += 1
                    used += task.need
                    running[pool.submit(clock.task(task.name, task.run))] = task
                    _prefetch(tasks[index : index + 1])
                with clock.stage(clock.WAITING):
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
    """Tells glibc to return blocks of 4 MiB and more to the system when they are freed.

    By default glibc raises that bound up to 32 MiB as such blocks come, and the heap of every thread keeps what it once
    needed: that was a third more memory at the peak. Smaller blocks stay in the heap, up to 16 MiB each: the buffers of
    a run would otherwise be returned and faulted in again at every step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def available_memory() -> int:
    """Bytes that this process can still take: what the kernel calls available, or less if a control group limits it."""
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
