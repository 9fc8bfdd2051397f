"""X in a file: the merged task vector as the rule reads it at scale 1. It is made from the state once, and scaled from
the file as often as it takes. The file is no part of the state."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from continual.engine.reading import Reading
from continual.engine.spool import Spool
from continual.executors.contract import Executor, Progress
from continual.lazily import torch
from continual.records import TensorSpec
from continual.rules import ReadOptions, Size
from continual.state.durable import environment


class Scratch(Reading):
    """Reads the merged model that `of` reads, under `options`, with X from `kept`. The bits are those that the rule
    would read, without the work of that."""

    kept_by_elements = False
    stored = False

    def __init__(self, of: Reading, kept: Spool, options: ReadOptions) -> None:
        super().__init__(of.state, of.rule, of.commit.seq, options, of.lengths)
        self._of = of
        self._kept = kept
        self.totals = of.totals  # of a state of adapters those of the models that are read

    def size(self) -> Size:
        """How long X is, which was measured as it was written."""
        return self._of.size()

    def unit(self, spec: TensorSpec) -> torch.Tensor:
        """X of one tensor: float32, of the tensor's shape, in new memory. Raises Retry."""
        with environment("cannot read the scratch file"):
            found = self._kept.get(spec.name, spec.shape)
        assert found is not None, "all of X was written"
        return found

    def need(self, spec: TensorSpec) -> int:
        """Peak bytes of reading one tensor."""
        return 4 * spec.numel

    def made_from(self, spec: TensorSpec) -> object:  # noqa: ARG002 - as of every reading
        """Another word each time: nothing is taken of what is written for a trial."""
        return secrets.token_hex(8)


def nbytes(reading: Reading) -> int:
    """Bytes of a scratch file."""
    return sum(4 * numel for numel in _sizes(reading).values())


@contextmanager
def written(
    reading: Reading, directory: Path, executor: Executor, progress: Progress
) -> Iterator[Callable[[ReadOptions], Scratch]]:
    """Writes X into a file in `directory`, tensor by tensor, and measures its length meanwhile; gives what makes of
    options the reading under them. The file is gone when the block ends. Raises Retry where the disk gets in the
    way."""
    told = f"cannot write a scratch file in {directory}"
    with environment(told):
        spool = Spool(directory, _sizes(reading))
    with closing(spool) as kept:
        with environment(told), reading.state.lease(reading.commit.seq):
            reading.measure(executor, progress, lambda spec, found: kept.put(spec.name, found))
        yield partial(Scratch, reading, kept)


def _sizes(reading: Reading) -> dict[str, int]:
    """Elements of each tensor that a model can change."""
    return {spec.name: spec.numel for spec in reading.state.format.tensors if spec.kind != "carried"}
