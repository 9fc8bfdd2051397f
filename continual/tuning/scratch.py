"""X in a file: the merged task vector as the rule reads it at scale 1. It is read from the state once, and scaled from
the file as often as it takes. The file is no part of the state."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from continual.engine.reading import Reading
from continual.executors.contract import Executor, Progress
from continual.lazily import torch
from continual.publish.weights import Placed, header, raw, write_at
from continual.records import TensorSpec
from continual.rules import ReadOptions, Size
from continual.state.durable import environment
from continual.tensors import Checkpoint


class Scratch(Reading):
    """Reads the merged model that `of` reads, under `options`, with X from a scratch file. The bits are those that the
    rule would read, without the work of that."""

    kept_by_elements = False

    def __init__(self, of: Reading, file: Checkpoint, options: ReadOptions) -> None:
        super().__init__(of.state, of.rule, of.commit.seq, options, of.lengths)
        self._of = of
        self._file = file
        self.totals = of.totals  # of a state of adapters those of the models that are read

    def size(self) -> Size:
        """How long X is, which was measured as it was written."""
        return self._of.size()

    def unit(self, spec: TensorSpec) -> torch.Tensor:
        """X of one tensor: float32, of the tensor's shape, in new memory."""
        return self._file.read(spec.name)

    def need(self, spec: TensorSpec) -> int:
        """Peak bytes of reading one tensor."""
        return 4 * spec.numel


def nbytes(reading: Reading) -> int:
    """Bytes of a scratch file."""
    return sum(4 * spec.numel for spec in reading.state.format.tensors if spec.kind != "carried")


def write(reading: Reading, file: Path, executor: Executor, progress: Progress) -> None:
    """Writes X as float32 into the safetensors file `file`, tensor by tensor, and measures its length meanwhile. Raises
    Retry where the disk gets in the way."""
    placed: dict[str, Placed] = {}
    end = 0
    for spec in reading.state.format.tensors:
        if spec.kind != "carried":
            placed[spec.name] = Placed(spec.name, spec.name, "F32", spec.shape, end, end + 4 * spec.numel)
            end += 4 * spec.numel
    head = header(list(placed.values()))
    with environment(f"cannot write {file}"), reading.state.lease(reading.commit.seq):
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, len(head) + end)  # what no adapter can change is zero
            write_at(fd, memoryview(head), 0)
            reading.measure(executor, progress, partial(_put, fd, len(head), placed))
        finally:
            os.close(fd)


def _put(fd: int, start: int, placed: dict[str, Placed], spec: TensorSpec, found: torch.Tensor) -> None:
    write_at(fd, raw(found), start + placed[spec.name].begin)
