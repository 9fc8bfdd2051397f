"""Tensors that are dear to make, kept in a file until they are read again: an export that has to know how long the
merged task vector is before it writes it decomposes each matrix once, and a tuning once for all that it tries."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from continual.lazily import torch
from continual.timing.clock import stage


class Spool:
    """Float32 tensors of known sizes in a file that has no name, and is gone when it is closed. Threads may share it,
    each with tensors of its own."""

    def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
        """`sizes`: elements of each tensor. Raises OSError."""
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`
        self._directory = directory
        self._at: dict[str, int] = {}
        end = 0
        for name, numel in sizes.items():
            self._at[name], end = end, end + 4 * numel
        self._there: set[str] = set()

    def put(self, name: str, values: torch.Tensor) -> None:
        """Keeps a tensor of the CPU. Raises OSError where the disk does not take it; then it is not kept."""
        data, offset = values.contiguous().view(-1).view(torch.uint8).numpy().data, self._at[name]
        with stage("write", len(data)):
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        self._there.add(name)

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """A tensor that was kept, in new memory; None where it was not. Raises OSError."""
        if name not in self._there:
            return None
        found = torch.empty(shape)
        data, offset = found.view(-1).view(torch.uint8).numpy().data, self._at[name]
        with stage("read", len(data)):
            while data:
                count = os.preadv(self._file.fileno(), [data], offset)
                if not count:
                    raise OSError(f"a file without a name in {self._directory} ends early")
                data, offset = data[count:], offset + count
        return found

    def close(self) -> None:
        """Gives its room back."""
        self._there.clear()
        self._file.close()


def roomy(directory: Path, nbytes: int) -> bool:
    """Whether the disk of `directory` has `nbytes`, and a tenth of itself besides. Raises OSError."""
    usage = shutil.disk_usage(directory)
    return usage.free - nbytes >= usage.total // 10
