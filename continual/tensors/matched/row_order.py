"""A candidate's tables in the order of the base's rows, where tokens were matched by their texts: a row that the
candidate lacks is read as the base has it, so that nothing changes there."""

from __future__ import annotations

import bisect
import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from continual.lazily import torch
from continual.records import ITEMSIZE, Lineage, TokenRows
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.checkpoints.checkpoint import TORCH, Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.matched.matching import Match

_SCATTERED = 1024
"""Runs of rows beyond which the whole table is held in memory while it is read: from the Hub, one row at a time would
fetch the table many times."""


class Reordered(NamedTuple):
    """A table of a candidate: as its file has it, which rows are which, and the base's table."""

    theirs: TensorInfo
    rows: TokenRows
    ours: TensorInfo

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.ours.shape[1:])


def moved_of(tokens: Sequence[TokenRows]) -> dict[str, TokenRows]:
    """The base's names of the tables whose rows have to be put into another order."""
    return {name: rows for rows in tokens if rows.moved for name in rows.tables}


class InOrderOf(Checkpoint):
    """A candidate's checkpoint with some `tables` in the order of the rows of `base`. It shares the files of `model`,
    which is to be closed. `zeros`: rows that the candidate lacks are 0."""

    def __init__(
        self, base: Checkpoint, model: Checkpoint, tables: Mapping[str, Reordered], *, zeros: bool = False
    ) -> None:
        self.__dict__.update(model.__dict__)
        self._base, self._model, self._tables, self._zeros = base, model, tables, zeros
        self._held: tuple[str, torch.Tensor] | None = None
        self._lock = threading.Lock()
        self.tensors = {**model.tensors, **{name: in_order(table) for name, table in tables.items()}}

    @classmethod
    def beside(cls, base: Checkpoint, shipped: Checkpoint, tables: Mapping[str, Reordered]) -> InOrderOf:
        """What is shipped beside the weights, tensor by tensor of the same names, in the same order; 0 for rows that
        the candidate lacks."""
        found = shipped.tensors
        there = {name: table._replace(theirs=found[name]) for name, table in tables.items() if name in found}
        return cls(base, shipped, there, zeros=True)

    def plain(self, name: str) -> torch.Tensor:
        """A tensor as the candidate's file has it. Raises Retry."""
        return self._model.read(name)

    def read_part(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """As `Checkpoint.read_part`."""
        table = self._tables.get(info.name)
        if table is None:
            self._model.read_part(info, start, into)
            return
        row = table.width * ITEMSIZE[table.theirs.dtype]
        source = self._whole(table) if len(table.rows.runs) > _SCATTERED else None
        for first, there, count in _spans(table.rows.runs, start, len(into), row):
            part = into[first - start : first - start + count]
            if there is None:
                self._lacking(table, first, part)
            elif source is not None:
                part[:] = source[there : there + count].numpy().data
            else:
                self._model.read_part(table.theirs, there, part)
        if source is not None and start + len(into) >= info.nbytes:
            with self._lock:
                self._held = None

    def extents(self, infos: Sequence[TensorInfo]) -> list[tuple[int, int, int]]:
        """As `Checkpoint.extents`."""
        return self._model.extents([part for info in infos for part in self._expected(info)])

    def prefetch(self, info: TensorInfo) -> None:
        """As `Checkpoint.prefetch`."""
        table = self._tables.get(info.name)
        self._model.prefetch(info if table is None else table.theirs)

    def workspace(self, name: str) -> int:
        """Bytes that reading the tensor takes besides what is read into."""
        table = self._tables.get(name)
        return table.theirs.nbytes if table is not None and len(table.rows.runs) > _SCATTERED else 0

    def _expected(self, info: TensorInfo) -> Iterator[TensorInfo]:
        table = self._tables.get(info.name)
        if table is None or len(table.rows.runs) > _SCATTERED:
            yield info if table is None else table.theirs
            return
        row = table.width * ITEMSIZE[table.theirs.dtype]
        for _, first, count in table.rows.runs:
            yield table.theirs._replace(offset=table.theirs.offset + first * row, nbytes=count * row)

    def _lacking(self, table: Reordered, start: int, into: memoryview) -> None:
        """Fills `into` with what stands for rows that the candidate lacks, from its byte `start` on."""
        if self._zeros:
            into[:] = bytes(len(into))
            return
        size, wide = ITEMSIZE[table.theirs.dtype], ITEMSIZE[table.ours.dtype]
        raw = torch.empty(len(into) // size * wide, dtype=torch.uint8)
        self._base.read_part(table.ours, start // size * wide, raw.numpy().data)
        values = raw.view(TORCH[table.ours.dtype]).to(TORCH[table.theirs.dtype])
        into[:] = values.view(torch.uint8).numpy().data

    def _whole(self, table: Reordered) -> torch.Tensor:
        with self._lock:
            if self._held is None or self._held[0] != table.theirs.name:
                raw = torch.empty(table.theirs.nbytes, dtype=torch.uint8)
                self._model.read_part(table.theirs, 0, raw.numpy().data)
                self._held = (table.theirs.name, raw)
            return self._held[1]


def in_order(table: Reordered) -> TensorInfo:
    """What is said of a table once it is read in the base's order."""
    nbytes = math.prod(table.ours.shape) * ITEMSIZE[table.theirs.dtype]
    return table.theirs._replace(shape=table.ours.shape, nbytes=nbytes)


def tables_of(base: Checkpoint, found: Mapping[str, Match], lineage: Lineage) -> dict[str, Reordered]:
    """The tables of a candidate that are put into order, by its own names for them."""
    tables: dict[str, Reordered] = {}
    for name, rows in moved_of(lineage.tokens).items():
        source = found[name]
        for info in (source.full, *source.twins) if source.full is not None else ():
            tables[info.name] = Reordered(info, rows, base.tensors[name])
    return tables


def turned(base: Checkpoint, model: Checkpoint | Adapter, tables: Mapping[str, Reordered]) -> Checkpoint | Adapter:
    """The candidate with these tables in the order of the base's rows."""
    if not tables:
        return model
    if not isinstance(model, Adapter):
        return InOrderOf(base, model, tables)
    other = copy.copy(model)
    other.weights = InOrderOf(base, model.weights, tables)
    return other


def matches(found: Mapping[str, Match], tables: Mapping[str, Reordered]) -> dict[str, Match]:
    """The sources with the tables as they are read in order."""
    by_info = {id(table.theirs): in_order(table) for table in tables.values()}

    def of(source: Match) -> Match:
        full = source.full
        return source._replace(
            full=None if full is None else by_info.get(id(full), full),
            twins=tuple(by_info.get(id(twin), twin) for twin in source.twins),
        )

    return {name: of(source) for name, source in found.items()}


def gather(rows: TokenRows, added: torch.Tensor, out: torch.Tensor) -> None:
    """What is added to each row of a candidate's table into `out`, which has the base's rows; the others get 0."""
    out.zero_()
    for ours, theirs, count in rows.runs:
        out[ours : ours + count] = added[theirs : theirs + count]


def scatter(rows: TokenRows, base: torch.Tensor, length: int) -> torch.Tensor:
    """The base's table in the order of a candidate's, of `length` rows; those that the base lacks are 0."""
    out = torch.zeros(length, *base.shape[1:], dtype=base.dtype)
    for ours, theirs, count in rows.runs:
        out[theirs : theirs + count] = base[ours : ours + count]
    return out


def _spans(
    runs: Sequence[tuple[int, int, int]], start: int, count: int, row: int
) -> Iterator[tuple[int, int | None, int]]:
    """The bytes from `start` on of a table in the base's order: where each part begins, where it is in the candidate's
    table (None: nowhere), and how long it is. `row`: bytes of a row."""
    at, end = start, start + count
    index = max(0, bisect.bisect_right(runs, at // row, key=lambda run: run[0]) - 1)
    while at < end:
        while index < len(runs) and (runs[index][0] + runs[index][2]) * row <= at:
            index += 1
        if index == len(runs):
            yield at, None, end - at
            return
        ours, theirs, rows = runs[index]
        if at < ours * row:
            stop = min(end, ours * row)
            yield at, None, stop - at
        else:
            stop = min(end, (ours + rows) * row)
            yield at, theirs * row + at - ours * row, stop - at
        at = stop
