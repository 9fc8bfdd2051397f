"""Writing a safetensors file: its header, and tensors at their offsets, in any order, by any number of processes. What
the tensors are is not known here.

Machines that share a folder may write one file, each its own bytes of it: the file has its whole length before, and is
opened for writing alone. A client of NFS then sends the bytes that were written and none that it believes to stand
around them. Where a file system keeps only what the last of them wrote, `check_ends` sees that.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header padded with spaces,
tensors back to back).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from blake3 import blake3

from continual.errors import Misconfigured
from continual.lazily import torch
from continual.state.durable import sync_open
from continual.timing.clock import stage

_END = 64
"""Bytes at either end of a tensor that are looked at again."""


class Placed(NamedTuple):
    """Where a tensor lies in a file: its bytes from `begin` to `end`, counted after the header. `made_of` is the base
    tensor it is made from: another one where it is a tied alias."""

    name: str
    made_of: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(placed: Sequence[Placed], said: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The head of a file: length and JSON, padded so that the data begin at a multiple of 8. `said`: what else it says
    of the file."""
    body: dict[str, object] = {"__metadata__": {"format": "pt", **said}}
    body.update({p.name: {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [p.begin, p.end]} for p in placed})
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, in as many writes as it takes. Safe from several threads."""
    data = data.cast("B")
    with stage("write", len(data)):
        while data:
            written = os.pwrite(fd, data, offset)
            data = data[written:]
            offset += written


class FileSpan(NamedTuple):
    """The bytes of a file that a tensor has: `nbytes` from `start` on."""

    file: str
    start: int
    nbytes: int


class SpanEnds(NamedTuple):
    """The first and the last bytes that were written to a span."""

    span: FileSpan
    first: bytes
    last: bytes


class SpanWriter:
    """Writes a tensor to its span of the open file `fd`, in pieces."""

    def __init__(self, fd: int, span: FileSpan) -> None:
        self._fd, self._span = fd, span
        self._first = self._last = b""

    def write(self, data: memoryview, at: int = 0) -> None:
        """Writes all of `data`, `at` so many bytes from the beginning of the span. Raises OSError."""
        data = data.cast("B")
        if at == 0:
            self._first = bytes(data[:_END])
        if at + len(data) == self._span.nbytes:
            self._last = bytes(data[-_END:])
        write_at(self._fd, data, self._span.start + at)

    def write_hashed(self, pieces: Iterable[memoryview]) -> str:
        """Writes pieces one after the other; returns the BLAKE3 hash of all of them. Raises OSError."""
        seen, done = blake3(), 0
        for data in pieces:
            with stage("hash", data.nbytes):
                seen.update(data)
            self.write(data, done)
            done += data.nbytes
        return seen.hexdigest()

    @property
    def ends(self) -> SpanEnds:
        """What was written at the ends of the span."""
        return SpanEnds(self._span, self._first, self._last)


class SpanFiles:
    """The files of a directory that tensors are written to, each open from when it is first needed. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def writer(self, span: FileSpan) -> SpanWriter:
        """For one tensor. Raises OSError."""
        with self._lock:
            if span.file not in self._fds:
                self._fds[span.file] = os.open(self._directory / span.file, os.O_WRONLY | os.O_CLOEXEC)
            return SpanWriter(self._fds[span.file], span)

    def sync(self) -> None:
        """fsync of all that are open. Raises Halt."""
        for file, fd in self._fds.items():
            sync_open(fd, self._directory / file)

    def close(self) -> None:
        """Closes them."""
        for fd in self._fds.values():
            os.close(fd)


def new_file(
    directory: Path, file: str, placed: Sequence[Placed], said: Mapping[str, str] = MappingProxyType({})
) -> list[FileSpan]:
    """Makes a file of its whole length that has its header; returns where each tensor goes. Raises OSError."""
    head = header(placed, said)
    fd = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, len(head) + max((p.end for p in placed), default=0))
        write_at(fd, memoryview(head), 0)
    finally:
        os.close(fd)
    return [FileSpan(file, len(head) + p.begin, p.end - p.begin) for p in placed]


def check_ends(directory: Path, found: Iterable[SpanEnds]) -> None:
    """Looks at what other processes wrote. Raises Misconfigured where it is not there, OSError."""
    for file, ends in groupby(sorted(found), lambda one: one.span.file):
        fd = os.open(directory / file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for (_, start, nbytes), first, last in ends:
                at = start + nbytes - len(last)
                if os.pread(fd, len(first), start) != first or os.pread(fd, len(last), at) != last:
                    raise Misconfigured(
                        f"{directory / file} has not what a worker wrote at byte {start}: the file system does not let "
                        "several machines write one file; export to another one, or set ray.exports = driver (--ray "
                        "exports=driver)"
                    )
        finally:
            os.close(fd)
