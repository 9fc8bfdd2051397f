"""The weights of an export, by orders: what a process needs to make some tensors of the merged model and to write them,
each to its own bytes of a file that is there. What a tensor of it is, exported_weights.py says.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from continual.engine.block_reading import BlockReading
from continual.engine.reading import Reading
from continual.engine.reading_orders import SentReading, sent_to
from continual.engine.sent import SentBase
from continual.errors import NotHere
from continual.executors.contract import Executor, Progress, Task
from continual.executors.orders import WorkJob, WorkPiece
from continual.publish.earlier import EarlierExport, Row, body_of, made_of
from continual.publish.exported_layout import layout, write_indexes
from continual.publish.exported_weights import merged, need
from continual.publish.weights import FileSpan, SpanEnds, SpanFiles, check_ends, new_file, raw
from continual.records import TensorSpec
from continual.tensors import BaseModel
from continual.tensors.vectors.thin import sides_of

_log = logging.getLogger("continual.publish")
R = TypeVar("R", bound="WithEnds")


class WithEnds(Protocol):
    """What making a tensor gave, with what is to be found where it was written."""

    @property
    def ends(self) -> Sequence[SpanEnds]:
        """Of each span that was written."""
        ...


class ExportForm(NamedTuple):
    """What is written: into this directory (an absolute path), in this dtype (a safetensors word; None: the base's
    own), in files of this many bytes (None: as the base's), with what an `earlier` export has of it."""

    directory: Path
    dtype: str | None
    shard_size: int | None
    earlier: Path | None


class TensorPlace(NamedTuple):
    """Which base tensor is made into which span, in which dtype, a safetensors word."""

    made_of: str
    dtype: str
    span: FileSpan


class TensorWritten(NamedTuple):
    """A tensor of an export that was written."""

    row: Row
    ends: tuple[SpanEnds, ...]


@dataclass(frozen=True)
class WritingJob(WorkJob[R]):
    """Tensors that are made of a reading, and written into files of `directory` that are there."""

    reading: SentReading
    directory: Path


@dataclass(frozen=True)
class ExportJob(WritingJob[TensorWritten]):
    """The weights of an export: each of `places`, by its name."""

    base: SentBase
    places: Mapping[str, TensorPlace]
    earlier: Path | None

    def open(self) -> AwayExporting:
        """Opens state and base."""
        return AwayExporting(self)


class Exporting:
    """Makes tensors of the merged model, and writes each to its place. Thread-safe."""

    def __init__(
        self,
        base: BaseModel,
        reading: Reading,
        places: Mapping[str, TensorPlace],
        files: SpanFiles,
        earlier: EarlierExport,
    ) -> None:
        self._base, self._reading = base, reading
        self._places = places
        self._specs = {spec.name: spec for spec in base.specs}
        self._files, self._earlier = files, earlier

    def write(self, name: str) -> TensorWritten:
        """One tensor. Raises Halt naming it where its dtype cannot hold it, Retry, Damaged, OSError."""
        place = self._places[name]
        spec, span, into = self._specs[place.made_of], place.span, self._files.writer(place.span)
        of = made_of(self._base, self._reading, spec, place.dtype)
        digest = self._earlier.take(of, into, span.nbytes)
        taken = digest is not None
        if digest is None:
            digest = into.write_hashed(map(raw, merged(self._base, self._reading, spec, place.dtype)))
        return TensorWritten(Row(span.file, span.start, span.nbytes, of, digest, taken), (into.ends,))


class AwayExporting:
    """Makes and writes tensors for another process."""

    def __init__(self, job: ExportJob) -> None:
        must_see(job.directory)
        self._job, self._earlier = job, EarlierExport(job.earlier)
        with ExitStack() as unless_open:
            self._reading = job.reading.open()
            unless_open.callback(self._reading.state.close)
            self._base = job.base.open(self._reading.state.format)
            unless_open.pop_all()

    def work(self, names: Sequence[str]) -> list[TensorWritten]:
        """Writes tensors, which are on disk when it returns. Raises as `Exporting.write`."""
        with synced_files(self._job.directory) as files:
            export = Exporting(self._base, self._reading, self._job.places, files, self._earlier)
            return [export.write(name) for name in names]

    def close(self) -> None:
        """Closes base and state."""
        self._base.checkpoint.close()
        self._reading.state.close()


class NotSeen(NotHere):
    """A worker does not see the directory that it is to write into."""


def must_see(directory: Path) -> None:
    """Raises NotSeen where this machine does not see a directory that another one made."""
    if not directory.is_dir():
        raise NotSeen(f"{directory} is not there: it lies in no folder that all machines share")


@contextmanager
def synced_files(directory: Path) -> Iterator[SpanFiles]:
    """Files to write to, that are on disk when the block has ended well. Raises Halt where an fsync fails."""
    with closing(SpanFiles(directory)) as files:
        yield files
        files.sync()


def write_weights(
    base: BaseModel, reading: Reading, form: ExportForm, executor: Executor, progress: Progress
) -> dict[str, object]:
    """Makes the files of an export; returns what `continual.json` says of them. `reading` is settled. Raises Halt if a
    value overflows the dtype, Misconfigured where workers cannot write them, Retry, Damaged, OSError."""
    directory, specs = form.directory, {spec.name: spec for spec in base.specs}
    earlier = None if form.earlier is None else form.earlier.resolve()
    files = layout(base, form.dtype, form.shard_size)
    write_indexes(files, directory)
    places = {
        f"{file[: file.rfind('/') + 1]}{p.name}": TensorPlace(p.made_of, p.dtype, span)
        for file, placed in files.items()
        for p, span in zip(placed, new_file(directory, file, placed), strict=True)
    }
    sent, job = sent_to(reading, executor), None
    if sent is not None:
        job = ExportJob(secrets.token_hex(8), sent, directory, SentBase.of(base), places, earlier)
    with closing(SpanFiles(directory)) as open_files:
        export = Exporting(base, reading, places, open_files, EarlierExport(earlier))
        tasks = []
        for name, place in places.items():
            spec = specs[place.made_of]
            reads = spec.nbytes + kept_of(reading, spec)
            tasks.append(Task(name, need(spec, reading), partial(export.write, name), reads=reads))
        rows = [one.row for _, one in written_by(tasks, job, executor, progress)]
    base.checkpoint.check_unchanged()
    return body_of(rows)


def kept_of(reading: Reading, spec: TensorSpec) -> int:
    """Bytes that a state has of one tensor, about."""
    if spec.kind == "carried":
        return 0
    if isinstance(reading, BlockReading):
        return sum(4 * reading.columns(layer) * sum(sides_of(layer.shape)) for layer in spec.layers)
    return 4 * spec.numel


def written_by(
    tasks: Sequence[Task[R]], job: WritingJob[R] | None, executor: Executor, progress: Progress
) -> Iterator[tuple[str, R]]:
    """What each task gave, by its name: done as a piece of `job`, where there is one and the workers see its directory,
    else in this process. It is looked whether what workers wrote is there. Raises what tasks raise, Misconfigured."""
    done: set[str] = set()
    ends: list[SpanEnds] = []
    progress("export", 0, len(tasks))

    def counted(name: str) -> None:
        done.add(name)
        progress("export", len(done), len(tasks))

    if job is not None:
        try:
            for name, one in executor.map([task._replace(run=WorkPiece(job, task.name)) for task in tasks]):
                ends += one.ends
                yield name, one
                counted(name)
        except NotSeen as error:
            _log.warning("this machine alone writes this export, without the workers of the cluster: %s", error)
    left = [task for task in tasks if task.name not in done]
    for name, one in executor.map(left) if left else ():
        yield name, one
        counted(name)
    if job is not None:
        check_ends(job.directory, ends)
