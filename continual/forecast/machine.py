"""What this machine can do at best, measured in about a second: the floors under a fold and an export."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from blake3 import blake3

from continual.executors.contract import Task
from continual.executors.local import Local
from continual.lazily import torch
from continual.state.durable import environment, sync_open, write_all
from continual.stores import Where

PIECE = 1 << 20
PIECES = 64
"""Pieces that are written and read: 64 MiB."""
SIDE = 512
TIMES = 3


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second of CPU time: `read` from files that the kernel has in memory, `hash` by BLAKE3, `checksum` by
    CRC-32C, `write` into the kernel's memory; and of wall time: `fsync` from there to the disk. `product`:
    floating-point operations a second of CPU time in products of float64 matrices. `threads`: how many may work at a
    time."""

    read: float
    hash: float
    checksum: float
    write: float
    fsync: float
    product: float
    threads: int

    def rate(self, stage: str) -> float | None:
        """Bytes a second of a stage; None of one that has no floor in bytes."""
        rates = {"read": self.read, "hash": self.hash, "checksum": self.checksum, "write": self.write}
        return (rates | {"fsync": self.fsync}).get(stage)


def measure(directory: Path, threads: int) -> Machine:
    """Measures this machine, its disk in `directory`, on one thread. What can be done again counts the least of three;
    writing and syncing once. Raises Retry where nothing can be written there."""
    (found,) = Local(1).map([Task("machine", 2 * PIECE, lambda: _measured(directory, threads))])
    return found[1]


def beside(state: Where) -> Path:
    """Where scratch files for work on a state go: beside it or above, in the first directory that may be written to,
    which is as a rule on the same disk; else where the system has its own."""
    for place in state.absolute().parents if isinstance(state, Path) else ():
        if place.is_dir():
            return place if os.access(place, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.gettempdir())


def _measured(directory: Path, threads: int) -> Machine:
    piece = np.random.default_rng(0).integers(0, 256, PIECE, np.uint8)
    total = PIECE * PIECES
    with environment(f"cannot measure the disk of {directory}"), tempfile.TemporaryFile(dir=directory) as file:
        fd = file.fileno()

        def write() -> None:
            os.lseek(fd, 0, os.SEEK_SET)
            for _ in range(PIECES):
                write_all(fd, piece.data)

        def read() -> None:
            for number in range(PIECES):
                os.preadv(fd, [into.data], number * PIECE)

        into = np.empty_like(piece)
        wrote = _seconds(write, 1)
        began = time.perf_counter()
        sync_open(fd, directory)
        synced = max(time.perf_counter() - began, 1e-9)
        reading = _seconds(read)
    whole = blake3()
    matrix = torch.rand(SIDE, SIDE, dtype=torch.float64)
    result = torch.empty_like(matrix)
    return Machine(
        read=total / reading,
        hash=8 * PIECE / _seconds(lambda: [whole.update(piece.data) for _ in range(8)]),
        checksum=8 * PIECE / _seconds(lambda: [google_crc32c.extend(0, piece) for _ in range(8)]),
        write=total / wrote,
        fsync=total / synced,
        product=2.0 * SIDE**3 / _seconds(lambda: torch.matmul(matrix, matrix, out=result)),
        threads=threads,
    )


def _seconds(work: Callable[[], object], times: int = TIMES) -> float:
    """CPU seconds of the quickest of several times: others at work on the machine count for little."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return max(min(found), 1e-9)
