"""On which device tensors are computed, and whose turn it is there. Nothing here knows what the work is.

Tasks run on as many threads as there are cores. On an accelerator a few of them compute at a time, each in a stream of
its own, so that one copies while another computes; the other threads read, hash and write meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Generic, TypeVar

from continual.errors import ContinualError, Halt, Retry
from continual.lazily import torch

S = TypeVar("S")
LANES = 4
"""Tasks that compute on an accelerator at a time."""
SHARE = 0.9
"""Of the memory that is free on it when the first turn is taken: what all that compute at a time may take."""
_FIRST = threading.Lock()


def pick_device(word: str) -> torch.device:
    """The device that the setting `device` names: `auto` is the first CUDA device if there is one, else the CPU.

    On CUDA it turns TF32 off for the process, because TF32 would round to 10 bits. Raises ContinualError if CUDA is
    named and this torch sees none, Retry where the device has no memory left, Halt where it fails.
    """
    if word != "cpu":
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            device = torch.device("cuda" if word == "auto" else word)
            with _FIRST, _in_words(device):
                _load_linalg(device)
            return device
        if word != "auto":
            raise ContinualError(f"device = {word}: this torch sees no CUDA device; use auto or cpu")
    return torch.device("cpu")


@cache
def _load_linalg(device: torch.device) -> None:
    """Has torch load what decomposes matrices on CUDA: it does so at the first call, and fails where two threads make
    that at once ("lazy wrapper should be called at most once", seen with torch 2.11)."""
    torch.linalg.inv(torch.eye(2, device=device))


@contextmanager
def turn(device: torch.device, nbytes: int) -> Iterator[torch.device]:
    """Waits until work that takes `nbytes` on `device` may compute there, and gives the device to compute on.

    That is the CPU where it is the CPU that was asked for, or where the work takes more than was free on the device at
    the first turn. Within the turn nothing should be read from a disk. Raises Retry where others have taken the
    device's memory since, Halt where it fails.
    """
    if device.type != "cuda":
        yield device
        return
    with _FIRST:
        lanes = _lanes(device)
    with lanes.take(nbytes) as stream:
        if stream is None:
            yield torch.device("cpu")
            return
        with _in_words(device), torch.cuda.stream(stream):
            yield device
            stream.synchronize()


@contextmanager
def _in_words(device: torch.device) -> Iterator[None]:
    """Says what is wrong with an accelerator, and what to do. Raises Retry and Halt."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise Retry(
            f"{device} has no memory left: other processes take it; end one of them, or set device = cpu; "
            "nothing was settled"
        ) from error
    except getattr(torch, "AcceleratorError", ()) as error:  # torch before 2.8 has none
        # the driver takes no more calls of this process
        said = str(error).splitlines()[0]
        raise Halt(f"{device} failed ({said}): look at the device, then start continual again") from error


@cache
def _lanes(device: torch.device) -> Lanes[torch.cuda.Stream]:
    free, _ = torch.cuda.mem_get_info(device)
    lanes = [torch.cuda.Stream(device) for _ in range(LANES)]  # type: ignore[no-untyped-call]
    return Lanes(int(SHARE * free), lanes)


class Lanes(Generic[S]):
    """Lanes that work takes one at a time, while what all of it needs fits in `room` bytes. Thread-safe."""

    def __init__(self, room: int, lanes: list[S]) -> None:
        self._room = room
        self._free = lanes
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[S | None]:
        """A lane, once there is one and room for `nbytes`; None where there never will be."""
        if nbytes > self._room:
            yield None
            return
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free) and self._used + nbytes <= self._room)
            lane = self._free.pop()
            self._used += nbytes
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                self._used -= nbytes
                self._changed.notify_all()
