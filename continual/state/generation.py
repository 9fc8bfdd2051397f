"""A generation: one immutable Zarr v3 group of all accumulators, with receipts.json. Reading and checking; see
transaction.py for writing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from continual.errors import Damaged, Misconfigured
from continual.records import KEY, OMITTED, SlotSpec
from continual.state import arrays, framing, names
from continual.state.arrays import Array
from continual.state.durable import environment
from continual.state.fields import record_of
from continual.state.format import Format

RECEIPTS = "receipts.json"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an array was when it was written: the CRC of its zarr.json, the bytes of its values, and the CRC of each
    chunk that is there (values and padding) in row order."""

    metadata: str
    nbytes: int = field(metadata={KEY: "bytes"})
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Receipts:
    """What receipts.json says: of each group, by its path, the CRC of its zarr.json; of each array its receipt;
    `squares`: tensor name to ‖X‖² of what the rule keeps of it; earlier versions have written none. `ranks`: tensor
    name to the sum of the ranks of the task vectors in it, where the rule goes by that and all are known."""

    groups: Mapping[str, str]
    arrays: Mapping[str, Receipt]
    squares: Mapping[str, float] | None = field(default=None, metadata={OMITTED: True})
    ranks: Mapping[str, int] | None = field(default=None, metadata={OMITTED: True})


@functools.cache
def node(slot: str, name: str) -> str:
    """Path of an array below its generation."""
    return f"{names.encode(slot)}/{names.encode(name)}"


class Generation:
    """A committed generation on disk; `checksum` is the CRC of its receipts that the commit holds."""

    def __init__(self, directory: Path, form: Format, checksum: str) -> None:
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
            return self.directory.exists()

    def has(self, name: str) -> bool:
        """Whether there is anything of a tensor: where a state keeps adapters, one that none of them changes has no
        arrays."""
        if not self.form.sparse:
            return True
        arrays_there = self.receipts.arrays
        return any(node(slot, name) in arrays_there for slot in self.form.slots[name])

    def square(self, name: str) -> float | None:
        """‖X‖² of what is kept of a tensor; None where an earlier version wrote the generation. Raises as `load`."""
        return (self.receipts.squares or {}).get(name)

    def rank(self, name: str) -> int | None:
        """The sum of the ranks of the task vectors in a tensor, where all of them are known. Raises as `load`."""
        return 0 if self.square(name) == 0.0 else (self.receipts.ranks or {}).get(name)

    def held(self) -> Iterator[tuple[str, str, SlotSpec]]:
        """The arrays that have to be there: tensor, slot, and what the array is."""
        for name, slots in self.form.slots.items():
            if self.has(name):
                yield from ((name, slot, spec) for slot, spec in slots.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all values in it, padding included where arrays may end early."""
        if not self.form.sparse:
            return self.form.generation_bytes
        return sum(
            len(self.receipt(node(slot, name)).chunks) * arrays.chunk_bytes(spec) for name, slot, spec in self.held()
        )

    def place(self, path: str) -> str:
        """The directory of the array at `path`."""
        return f"{self.directory}/{path}"

    def receipt(self, path: str) -> Receipt:
        """The receipt of the array at `path`. Raises Damaged if there is none."""
        found = self.receipts.arrays.get(path)
        if found is None:
            raise Damaged(f"{self.directory}: no receipt for {path}")
        return found

    def read(self, name: str, slot: str) -> Array:
        """One accumulator, every byte checked against its receipt. Raises Damaged, or Misconfigured if the generation
        has expired."""
        path, spec = node(slot, name), self.form.slots[name][slot]
        if not self.has(name):
            return arrays.nothing(spec)
        with environment(f"cannot read tensor {name}"):
            return arrays.read(self.place(path), spec, self.receipt(path).chunks)

    def read_rows(self, name: str, slot: str, start: int, stop: int) -> Array:
        """The rows from `start` to before `stop` of an accumulator whose slot has `rows`. Raises as `read`."""
        path, spec = node(slot, name), self.form.slots[name][slot]
        if not self.has(name):
            return np.zeros((stop - start, *spec.shape[1:]), spec.dtype)
        with environment(f"cannot read tensor {name}"):
            return arrays.read_rows(self.place(path), spec, self.receipt(path).chunks, start, stop)

    def reader(self, name: str, slot: str) -> arrays.Reader:
        """One accumulator, to be read in order and in pieces, every chunk checked against its receipt."""
        path = node(slot, name)
        return arrays.Reader(self.place(path), self.form.slots[name][slot], self.receipt(path).chunks)

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

    def check(self, step: Callable[[], None]) -> Iterator[str]:
        """Reads everything and yields what is wrong; `step` is called after each array."""
        try:
            receipts = self.receipts
        except (Damaged, Misconfigured) as error:
            yield str(error)
            return
        for path, checksum in receipts.groups.items():
            yield from _check_file(self.directory / path / "zarr.json", checksum)
        for name, slot, spec in self.held():
            path = node(slot, name)
            receipt = receipts.arrays.get(path)
            if receipt is None:
                yield f"{self.directory}: no receipt for {path}"
            else:
                yield from _check_file(self.directory / path / "zarr.json", receipt.metadata)
                try:
                    arrays.read(self.place(path), spec, receipt.chunks)
                except (Damaged, Misconfigured) as error:
                    yield str(error)
                except OSError as error:
                    yield f"{error.filename}: {error.strerror}"
            step()


def _check_file(path: Path, checksum: str) -> Iterator[str]:
    try:
        if framing.crc(path.read_bytes()) != checksum:
            yield f"{path} is damaged: its contents are not those its receipt is for"
    except OSError as error:
        yield f"{path}: {error.strerror}"
