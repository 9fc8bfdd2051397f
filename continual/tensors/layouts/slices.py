"""Factors of single experts, cut out of those that an adapter has for all experts of a layer together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from continual.lazily import torch
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.checkpoints.header import TensorInfo

_KEPT = 8
"""Whole factors that are kept in memory while experts are cut out of them."""


class Slice(NamedTuple):
    """What belongs to one of `experts` in a factor: rows `start` to `stop` of its side × rank. `of_b`: it is cut out of
    a B. `upright`: it is read as side × rank, else as rank × side."""

    source: TensorInfo
    of_b: bool
    number: int
    experts: int
    rank: int
    start: int
    stop: int
    upright: bool

    @property
    def info(self) -> TensorInfo:
        """The slice as a tensor."""
        side = self.stop - self.start
        shape = (side, self.rank) if self.upright else (self.rank, side)
        source = self.source
        name = f"{source.name}[{self.number}, {self.start}:{self.stop}]"
        each = source.nbytes // self.experts
        itemsize = source.nbytes // (source.shape[0] * source.shape[1])
        return TensorInfo(
            name, source.dtype, shape, source.file, source.offset + self.number * each, side * self.rank * itemsize
        )

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The slice of a factor that was read."""
        if self.of_b:
            mine = whole.view(-1, self.rank, self.experts)[self.start : self.stop, :, self.number]
        else:
            mine = whole.view(self.experts, self.rank, -1)[self.number, :, self.start : self.stop].T
        return (mine if self.upright else mine.T).contiguous()


class WithSlices(Checkpoint):
    """An adapter's weights, and slices of them under names of their own. It shares the files of `weights`."""

    def __init__(self, weights: Checkpoint, slices: Mapping[str, Slice]) -> None:
        self.__dict__.update(weights.__dict__)
        self.tensors = {**weights.tensors, **{name: one.info for name, one in slices.items()}}
        self._slices = slices
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `Checkpoint.read`."""
        if name not in self._slices:
            return super().read(name, out)
        one = self._slices[name]
        with self._lock:
            whole = self._kept.pop(one.source.name, None)
            if whole is None:
                whole = super().read(one.source.name)
                while len(self._kept) >= _KEPT:
                    self._kept.popitem(last=False)
            self._kept[one.source.name] = whole
        return one.of(whole)

    def extents(self, infos: Sequence[TensorInfo]) -> list[tuple[int, int, int]]:
        """As `Checkpoint.extents`."""
        mine = [self._slices[info.name].source if info.name in self._slices else info for info in infos]
        return super().extents(list(dict.fromkeys(mine)))
