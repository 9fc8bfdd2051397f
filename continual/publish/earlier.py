"""What an export takes of an earlier one: the bytes of tensors that did not change. Each is copied and hashed, and
taken only where it is what was written then: an export that was edited or damaged is not believed. Nothing is shared,
by links or otherwise: what somebody does to one export does not change another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from continual.engine.reading import Reading
from continual.outside import open_regular
from continual.publish.weights import SpanWriter
from continual.records import TensorSpec
from continual.state.software import software
from continual.tensors import BaseModel
from continual.tensors.checkpoints.place import RELEASE
from continual.timing.clock import stage

_MAKING = 1
"""Counts the changes of what exports make of the same accumulators."""
_PIECE = 1 << 20


class Row(NamedTuple):
    """A tensor of an export: its `file`, first byte there and bytes; `of`: a digest of all that it is made of;
    `digest`: the BLAKE3 hash of its bytes; `taken`: whether it is an earlier export's."""

    file: str
    start: int
    nbytes: int
    of: str
    digest: str
    taken: bool


class TensorCounts(NamedTuple):
    """How many tensors and bytes of an export were made, and how many were taken of an earlier one."""

    made: int = 0
    made_bytes: int = 0
    taken: int = 0
    taken_bytes: int = 0


def made_of(base: BaseModel, reading: Reading, spec: TensorSpec, dtype: str) -> str:
    """A digest of all that a tensor of an export follows from; `reading` is settled. Raises Misconfigured, Damaged."""
    info, record = base.checkpoint.tensors[spec.name], reading.state.format.base
    files = [(file.name, file.size, file.mtime_ns) for file in base.checkpoint.files]
    weights: object = record.digests.get(spec.name) or [files, info.file, info.offset, record.revision]
    vector = None if spec.kind == "carried" else reading.made_from(spec)
    said = [_MAKING, dict(software()), spec.name, spec.kind, info.dtype, info.shape, weights, dtype, vector]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


class EarlierExport:
    """The tensors of the export in a directory, as its `continual.json` has them; none where it is None, or where it
    says nothing of them that can be read. Thread-safe."""

    def __init__(self, directory: Path | None) -> None:
        self._rows: dict[str, Row] = {}
        self._directory = None if directory is None else directory.resolve()
        if self._directory is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self._rows = _rows(json.loads((self._directory / RELEASE).read_bytes())["weights"])

    def take(self, of: str, into: SpanWriter, nbytes: int) -> str | None:
        """Writes the bytes of the tensor that is made of the same; returns their hash. None where there is none, or it
        is not what it was when it was written: then what was written is to be written over. Raises OSError where it
        cannot be written."""
        row = self._rows.get(of)
        if row is None or self._directory is None or row.nbytes != nbytes:
            return None
        try:
            source = open_regular(self._directory / row.file)
        except (OSError, ValueError):  # a name that no file has
            return None
        try:
            return row.digest if into.write_hashed(_pieces(source, row)) == row.digest else None
        finally:
            os.close(source)


def _pieces(source: int, row: Row) -> Iterator[memoryview]:
    """The bytes of a tensor, as far as they can be read."""
    done = 0
    while done < row.nbytes:
        try:
            with stage("read", wanted := min(_PIECE, row.nbytes - done)):
                data = os.pread(source, wanted, row.start + done)
        except (OSError, OverflowError):  # a place that no file has
            return
        if not data:
            return
        yield memoryview(data)
        done += len(data)


def body_of(rows: Sequence[Row]) -> dict[str, object]:
    """What `continual.json` says of the tensors of an export: `made`, and for the next one `weights`."""
    weights: dict[str, list[str]] = {}
    for row in sorted(rows):
        weights.setdefault(row.file, []).append(f"{row.start} {row.nbytes} {row.of} {row.digest}")
    made, taken = [row.nbytes for row in rows if not row.taken], [row.nbytes for row in rows if row.taken]
    return {"made": TensorCounts(len(made), sum(made), len(taken), sum(taken))._asdict(), "weights": weights}


def taken_in(said: Mapping[str, object]) -> TensorCounts:
    """What the body of a `continual.json` says was made and taken; zeros where it says nothing."""
    found = said.get("made")
    return (
        TensorCounts(**found)
        if isinstance(found, dict) and found.keys() == set(TensorCounts._fields)
        else TensorCounts()
    )


def _rows(weights: Mapping[str, Sequence[str]]) -> dict[str, Row]:
    """The tensors by what they are made of. Raises ValueError, TypeError and AttributeError for what is none."""
    found = {}
    for file, lines in weights.items():
        for line in lines:
            start, nbytes, of, digest = line.split()
            found[of] = Row(file, int(start), int(nbytes), of, digest, taken=False)
    return found
