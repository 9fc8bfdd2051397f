"""Tensors that are dear to make, kept in a file until they are read again: an export that has to know how long the
merged task vector is before it writes it decomposes each matrix once, and a tuning once for all that it tries.

A `Spool` is of one process. A `SharedSpool` is of all machines that see a folder: what one has made another reads, and
what cannot be read, or is not what was kept, is made again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from continual.lazily import torch
from continual.state.durable import write_all
from continual.timing.clock import stage


class KeptTensors(Protocol):
    """Tensors that were made, for who needs them again."""

    def put(self, name: str, values: torch.Tensor) -> None:
        """Keeps a tensor of the CPU. Raises OSError where it cannot be kept."""
        ...

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """A tensor that was kept, in new memory; None where it was not. Raises OSError."""
        ...


class Spool:
    """Float32 tensors of known sizes in a file that has no name, and is gone when it is closed. Threads may share it,
    each with tensors of its own."""

    def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
        """`sizes`: elements of each tensor. Raises OSError."""
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`
        self._directory = directory
        self._at: dict[str, int] = {}
        self._sizes, end = dict(sizes), 0
        for name, numel in sizes.items():
            self._at[name], end = end, end + 4 * numel
        self._there: set[str] = set()

    def put(self, name: str, values: torch.Tensor) -> None:
        """Keeps a tensor of the CPU. Raises OSError where the disk does not take it; then it is not kept."""
        assert values.numel() <= self._sizes[name], f"{name} would lie over the next"
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


class SharedSpool:
    """Float32 tensors, each in a file of its own in `directory`, which is there. `kept`: the BLAKE3 hash of each that
    is kept, by its name. Threads may share it, each with tensors of its own; it can be sent to other processes."""

    def __init__(self, directory: Path, kept: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.kept = dict(kept or {})

    def put(self, name: str, values: torch.Tensor) -> None:
        """As `KeptTensors.put`. Another process has it once it knows the hash."""
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        fd = os.open(self._file(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
        self.kept[name] = blake3(data).hexdigest()

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """As `KeptTensors.get`; None also where what is there is not what was kept, and where it is not seen."""
        if name not in self.kept:
            return None
        found = torch.empty(shape)
        data = found.view(-1).view(torch.uint8).numpy().data
        try:
            with stage("read", len(data)), open(self._file(name), "rb", buffering=0) as file:
                done = 0
                while done < len(data) and (count := file.readinto(data[done:])):
                    done += count
        except OSError:
            return None
        return found if done == len(data) and blake3(data).hexdigest() == self.kept[name] else None

    def _file(self, name: str) -> Path:
        return self.directory / blake3(name.encode()).hexdigest(16)


@contextmanager
def kept_below(directory: Path, sizes: Mapping[str, int], *, shared: bool) -> Iterator[KeptTensors]:
    """A place in `directory` for tensors of these sizes (elements), of this process or `shared` with others; it is gone
    when the block ends. Raises OSError."""
    if not shared:
        with closing(Spool(directory, sizes)) as spool:
            yield spool
        return
    below = directory.absolute() / ".spool"
    below.mkdir()
    try:
        yield SharedSpool(below)
    finally:
        shutil.rmtree(below)


def roomy(directory: Path, nbytes: int) -> bool:
    """Whether the disk of `directory` has `nbytes`, and a tenth of itself besides. Raises OSError."""
    usage = shutil.disk_usage(directory)
    return usage.free - nbytes >= usage.total // 10
