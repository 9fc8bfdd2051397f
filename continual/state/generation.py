"""A generation: one immutable Zarr v3 group of all accumulators, with receipts.json. Reading and checking; see
transaction.py for writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

from continual.errors import Damaged, Misconfigured
from continual.lazily import numpy as np
from continual.records import KEY, OMITTED
from continual.state import arrays, framing, holding, storing
from continual.state.arrays import Array
from continual.state.durable import environment
from continual.state.fields import record_of
from continual.state.format import Format
from continual.state.layout import Location
from continual.state.names import RECEIPTS
from continual.stores import Where


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an array was when it was written: the CRC of its zarr.json, the bytes of its values, and the CRC of each
    chunk that is there (values and padding) in row order."""

    metadata: str
    nbytes: int = field(metadata={KEY: "bytes"})
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReceiptTogether:
    """What an array of several tensors was when it was written: the CRC of its zarr.json, and of each tensor that has
    anything in it, by its number, the CRCs of its chunks in row order."""

    metadata: str
    chunks: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Receipts:
    """What receipts.json says: of each group, by its path, the CRC of its zarr.json; of each array its receipt, of
    those of several tensors in `together`; `squares`: tensor name to ‖X‖² of what the rule keeps of it; earlier
    versions have written none. `ranks`: tensor name to the sum of the ranks of the task vectors in it, where the rule
    goes by that and all are known."""

    groups: Mapping[str, str]
    arrays: Mapping[str, Receipt]
    together: Mapping[str, ReceiptTogether] | None = field(default=None, metadata={OMITTED: True})
    squares: Mapping[str, float] | None = field(default=None, metadata={OMITTED: True})
    ranks: Mapping[str, int] | None = field(default=None, metadata={OMITTED: True})

    def chunks(self, place: Location) -> tuple[str, ...] | None:
        """The CRCs of the chunks of one accumulator of one tensor; None where it is not there."""
        if place.number is None:
            receipt = self.arrays.get(place.array)
            return None if receipt is None else receipt.chunks
        shared = (self.together or {}).get(place.array)
        return None if shared is None else shared.chunks.get(str(place.number))

    def metadata_of(self, array: str) -> str:
        """The CRC of the zarr.json of an array that is there."""
        receipt = self.arrays.get(array) or (self.together or {})[array]
        return receipt.metadata

    @property
    def metadata(self) -> dict[str, str]:
        """The CRC of every zarr.json, by the path of its group or array."""
        return {
            **self.groups,
            **{path: receipt.metadata for path, receipt in self.arrays.items()},
            **{path: receipt.metadata for path, receipt in (self.together or {}).items()},
        }


class Generation:
    """A committed generation on disk; `checksum` is the CRC of its receipts that the commit holds."""

    def __init__(self, directory: Where, form: Format, checksum: str) -> None:
        self.directory = directory
        self.form = form
        self.checksum = checksum
        self.synced = True
        """Whether it is on disk, as all is that a record names."""
        self._receipts: Receipts | None = None

    @property
    def receipts(self) -> Receipts:
        """The receipts, read once. Raises as `load` does."""
        return self._receipts or self.load()

    def load(self) -> Receipts:
        """Makes sure that the generation is there, and reads the receipts if they were not read before. Raises
        Misconfigured if it has expired, Damaged if the receipts are not those that its record names."""
        gone = f"{self.directory} has expired: only the last few generations and tagged ones are kept"
        if not self._is_there():
            raise Misconfigured(gone)
        if self._receipts is None:
            try:
                body, checksum = framing.decode(self.directory / RECEIPTS)
            except Damaged:
                if not self._is_there():  # it expired between the two looks
                    raise Misconfigured(gone) from None
                raise
            if checksum != self.checksum:
                raise Damaged(
                    f"{self.directory / RECEIPTS} is not the one its commit was made with: "
                    f"it has the checksum {checksum}, not {self.checksum}"
                )
            self._receipts = record_of(Receipts, body, self.directory / RECEIPTS)
        return self._receipts

    def _is_there(self) -> bool:
        with environment(f"cannot read {self.directory}"):
            return holding.of(self.directory).stands(self.directory)

    def has(self, name: str) -> bool:
        """Whether there is anything of a tensor: where a state keeps adapters, of one that none of them changes there
        is not."""
        if not self.form.sparse:
            return True
        receipts, layout = self.receipts, self.form.layout
        return any(receipts.chunks(layout.place(name, slot)) is not None for slot in self.form.slots[name])

    def is_nothing(self, name: str) -> bool:
        """Whether all that is kept of a tensor is zeros, as far as the receipts say: no model has changed it, or they
        took back what they changed. Raises as `load`."""
        if not self.has(name):
            return True
        places = [self.form.layout.place(name, slot) for slot in self.form.slots[name]]
        return not self.square(name) and all(list(self.chunks(one)) == arrays.zeros(one.spec) for one in places)

    def marks(self, name: str, slots: Iterable[str]) -> list[object]:
        """What tells these accumulators of a tensor from others: the CRCs of all chunks, and ‖X‖² of what is kept of
        it. Raises as `load`."""
        return [[list(self.chunks(self.form.layout.place(name, slot))) for slot in slots], self.square(name)]

    def square(self, name: str) -> float | None:
        """‖X‖² of what is kept of a tensor; None where an earlier version wrote the generation. Raises as `load`."""
        return (self.receipts.squares or {}).get(name)

    def rank(self, name: str) -> int | None:
        """The sum of the ranks of the task vectors in a tensor, where all of them are known. Raises as `load`."""
        return 0 if self.square(name) == 0.0 else (self.receipts.ranks or {}).get(name)

    def held(self) -> Iterator[tuple[str, Location]]:
        """What has to be there: each tensor's name, with the place of each of its accumulators."""
        for name, slots in self.form.slots.items():
            if self.has(name):
                yield from ((name, self.form.layout.place(name, slot)) for slot in slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all values in it, padding included where arrays may end early."""
        if not self.form.sparse:
            return self.form.generation_bytes
        return sum(len(self.chunks(place)) * arrays.chunk_bytes(place.spec) for _, place in self.held())

    def path(self, file: str) -> storing.Stem:
        """The path of a file or directory below it."""
        return storing.below(storing.stem(self.directory), file)

    def count(self, name: str, slot: str) -> int:
        """How many chunks one accumulator of a tensor has, 0 where it is not there. Raises as `load`."""
        return len(self.receipts.chunks(self.form.layout.place(name, slot)) or ())

    def chunks(self, place: Location) -> tuple[str, ...]:
        """The CRCs of the chunks at a place. Raises Damaged if there is no receipt of it."""
        found = self.receipts.chunks(place)
        if found is None:
            raise Damaged(f"{self.directory}: no receipt for {place.stem}")
        return found

    def read(self, name: str, slot: str, into: Array | None = None) -> Array:
        """One accumulator, every byte checked against its receipt; `into` is as `arrays.read` has it. Raises Damaged,
        or Misconfigured if the generation has expired."""
        place = self.form.layout.place(name, slot)
        if not self.has(name):
            return arrays.nothing(place.spec, into)
        with self._reading(name, place):
            return arrays.read(self.path(place.stem), place.spec, self.chunks(place), into)

    def read_rows(self, name: str, slot: str, start: int, stop: int) -> Array:
        """The rows from `start` to before `stop` of an accumulator whose slot has `rows`. Raises as `read`."""
        place = self.form.layout.place(name, slot)
        if not self.has(name):
            return np.zeros((stop - start, *place.spec.shape[1:]), place.spec.dtype)
        with self._reading(name, place):
            return arrays.read_rows(self.path(place.stem), place.spec, self.chunks(place), start, stop)

    def reader(self, name: str, slot: str) -> arrays.Reader:
        """One accumulator, to be read in order and in pieces, every chunk checked against its receipt."""
        place = self.form.layout.place(name, slot)
        return arrays.Reader(self.path(place.stem), place.spec, self.chunks(place))

    def parts(self, name: str, count: int) -> Iterator[dict[str, Array]]:
        """The accumulators of a tensor in `count` parts, one after the other: of each a part of its elements, flat, in
        new memory. Raises as `read`."""
        slots = self.form.slots[name]
        with ExitStack() as files, environment(f"cannot read tensor {name}"):
            readers = {slot: files.enter_context(closing(self.reader(name, slot))) for slot in slots}
            for _ in range(count):
                values = {slot: np.empty(math.prod(s.shape) // count, s.dtype) for slot, s in slots.items()}
                for slot, value in values.items():
                    readers[slot].read(arrays.raw(value))
                yield values

    def runs(self, name: str, length: int) -> Iterator[tuple[int, int, dict[str, Array]]]:
        """The accumulators of a tensor that all have its shape, in flat runs of at most `length` elements: (first
        element, one past the last, accumulators by slot). The next run reuses their memory. Raises as `read`."""
        slots = self.form.slots[name]
        numel = math.prod(next(iter(slots.values())).shape)
        buffers = {slot: np.empty(min(length, numel), spec.dtype) for slot, spec in slots.items()}
        with ExitStack() as files, environment(f"cannot read tensor {name}"):
            readers = {slot: files.enter_context(closing(self.reader(name, slot))) for slot in slots}
            for start in range(0, numel, length):
                values = {slot: buffer[: min(length, numel - start)] for slot, buffer in buffers.items()}
                for slot, value in values.items():
                    readers[slot].read(arrays.raw(value))
                yield start, min(start + length, numel), values

    def check(self, step: Callable[[], None]) -> Iterator[str]:
        """Reads everything and yields what is wrong; `step` is called after each array."""
        try:
            receipts = self.receipts
        except (Damaged, Misconfigured) as error:
            yield str(error)
            return
        for path, checksum in receipts.metadata.items():
            yield from _check_file(self.directory / f"{path}/zarr.json".lstrip("/"), checksum)
        for name, place in self.held():
            try:
                with named(name, place):
                    arrays.read(self.path(place.stem), place.spec, self.chunks(place))
            except (Damaged, Misconfigured) as error:
                yield str(error)
            except OSError as error:
                yield f"{error.filename}: {error.strerror}"
            step()

    @contextmanager
    def _reading(self, name: str, place: Location) -> Iterator[None]:
        with environment(f"cannot read tensor {name}"), named(name, place):
            yield


@contextmanager
def named(name: str, place: Location) -> Iterator[None]:
    """Damage names the tensor, where the path of the file does not."""
    try:
        yield
    except Damaged as error:
        if place.number is None:
            raise
        raise Damaged(f"tensor {name}: {error}") from error


def _check_file(path: Where, checksum: str) -> Iterator[str]:
    try:
        if framing.crc(storing.contents(path)) != checksum:
            yield f"{path} is damaged: its contents are not those its receipt is for"
    except OSError as error:
        yield f"{path}: {error.strerror}"
