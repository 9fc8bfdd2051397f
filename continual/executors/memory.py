"""Memory that tasks use one after the other. New memory comes from the kernel page by page, which for a large tensor
takes longer than reading it; here what a task no longer needs goes to the next. Nothing here knows what the work is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from continual.lazily import torch

Bytes = npt.NDArray[np.uint8]
_ALIGN = 64


class Memory:
    """Blocks of bytes, no more of them than are used at a time. Thread-safe. It lasts as long as the work does.

    `pinned`: CUDA copies from and to these blocks by itself, several times as fast as through memory of its own.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self, sizes: Sequence[int]) -> Iterator[list[Bytes]]:
        """Parts of one block, so many bytes each, that begin at multiples of 64 from its first; with anything in them.

        The block is the smallest that is free and large enough. Where there is none a new one takes the place of the
        largest.
        """
        lengths = [-(-size // _ALIGN) * _ALIGN for size in sizes]
        block = self._block(sum(lengths))
        try:
            ends = np.cumsum(lengths).tolist()
            yield [block[end - length :][:size] for end, length, size in zip(ends, lengths, sizes, strict=True)]
        finally:
            with self._lock:
                self._free.append(block)
                self._free.sort(key=len)

    def _block(self, nbytes: int) -> Bytes:
        with self._lock:
            place = next((i for i, block in enumerate(self._free) if len(block) >= nbytes), None)
            if place is not None:
                return self._free.pop(place)
            del self._free[-1:]  # before there is a new one
        block = np.empty(nbytes, np.uint8)
        if self._pinned and nbytes:
            _pin(block)
        return block


def _pin(block: Bytes) -> None:
    """Has CUDA lock a block in memory, until nobody has it any more. Where it cannot, copies are slower, and right."""
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cuda.cudaHostRegister(block.ctypes.data, block.nbytes, 0)) == 0:
        weakref.finalize(block, cuda.cudaHostUnregister, block.ctypes.data)
