"""A generation: one immutable Zarr v3 group of all accumulators, with receipts.json. Reading and checking; see
transaction.py for writing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from continual.errors import Damaged, Misconfigured
from continual.state import arrays, framing, names
from continual.state.arrays import Array
from continual.state.format import Format

RECEIPTS = "receipts.json"
Receipts = dict[str, Any]
"""`groups`: path to CRC of its zarr.json. `arrays`: path to {`metadata`: CRC of its zarr.json, `bytes`: of its values,
`chunks`: their CRCs}."""


def node(slot: str, name: str) -> str:
    """Path of an array below its generation."""
    return f"{names.encode(slot)}/{names.encode(name)}"


class Generation:
    """A committed generation on disk; `checksum` is the CRC of its receipts that the commit holds."""

    def __init__(self, directory: Path, form: Format, checksum: str) -> None:
        self.directory = directory
        self.form = form
        self.checksum = checksum

    @functools.cached_property
    def receipts(self) -> Receipts:
        """The receipts. Raises Damaged if they are not those the commit is for, Misconfigured if the generation has
        expired."""
        if not self.directory.exists():
            raise Misconfigured(f"{self.directory} has expired: only the last few generations and tagged ones are kept")
        body, checksum = framing.decode(self.directory / RECEIPTS)
        if checksum != self.checksum:
            raise Damaged(
                f"{self.directory / RECEIPTS} is not the one its commit was made with: it has the checksum {checksum}, not {self.checksum}"
            )
        return body

    def read(self, name: str, slot: str) -> Array:
        """One accumulator, every byte checked against its receipt."""
        path = node(slot, name)
        return arrays.read(self.directory / path, self.form.slots[name][slot], self._chunks(path))

    def reader(self, name: str, slot: str) -> arrays.Reader:
        """The same, to be read in order in pieces."""
        path = node(slot, name)
        return arrays.Reader(self.directory / path, self.form.slots[name][slot], self._chunks(path))

    def _chunks(self, path: str) -> list[str]:
        receipt = self.receipts["arrays"].get(path)
        if receipt is None:
            raise Damaged(f"{self.directory}: no receipt for {path}")
        chunks: list[str] = receipt["chunks"]
        return chunks

    def check(self, step: Callable[[], None]) -> Iterator[str]:
        """Reads everything and yields what is wrong; `step` is called after each array."""
        try:
            receipts = self.receipts
        except (Damaged, Misconfigured) as error:
            yield str(error)
            return
        for path, checksum in receipts["groups"].items():
            yield from _check_file(self.directory / path / "zarr.json", checksum)
        for name, slots in self.form.slots.items():
            for slot, spec in slots.items():
                path = node(slot, name)
                receipt = receipts["arrays"].get(path)
                if receipt is None:
                    yield f"{self.directory}: no receipt for {path}"
                else:
                    yield from _check_file(self.directory / path / "zarr.json", receipt["metadata"])
                    try:
                        arrays.read(self.directory / path, spec, receipt["chunks"])
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
