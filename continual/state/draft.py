"""The directory of a generation while it is written: the files of its arrays, new ones and links to those of the
generation before, their receipts, and what of them is not on disk yet. What the values are is the matter of
transaction.py."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from continual.state import arrays, framing
from continual.state.durable import sync_all, sync_file, sync_tree, write_bytes
from continual.state.fields import body_of
from continual.state.format import Format
from continual.state.generation import RECEIPTS, Generation, Receipt, Receipts, node


class Draft:
    """A generation of the form `form` in `directory`, on `before` (None: zeros). Threads may share it, as long as each
    tensor is one thread's. Whatever the disk refuses is an OSError."""

    def __init__(self, directory: Path, form: Format, before: Generation | None) -> None:
        self.directory = directory
        self._root = f"{directory}/"
        self._form = form
        self._before = before
        self._receipts: dict[str, Receipt] = {}
        groups = ["", *sorted({node(slot, "x").split("/")[0] for slot in form.slot_names})]
        self._groups = {path: framing.crc(arrays.group_metadata()) for path in groups}
        self._new: dict[str, tuple[str, ...]] = dict.fromkeys(groups, ("zarr.json",))
        """The files that were written here, by group or array; the others are links."""
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Makes the directory, with its groups."""
        for path in self._groups:
            os.mkdir(self._root + path)
            write_bytes(f"{self._root}{path}/zarr.json", arrays.group_metadata())

    def place(self, name: str, slot: str) -> str:
        """Makes the array's directory with its zarr.json, and returns it. The zarr.json is linked from the generation
        before where there is one: it is the same."""
        path = node(slot, name)
        os.mkdir(self._root + path)
        if self._has_before(name):
            self.take(path, ("zarr.json",))
        else:
            write_bytes(f"{self._root}{path}/zarr.json", arrays.metadata(self._form.slots[name][slot], name))
        return self._root + path

    def take(self, path: str, files: Iterable[str]) -> None:
        """Takes files of the array at `path` from the generation before."""
        assert self._before is not None, "what is linked is of a generation before"
        source, target = self._before.place(path), self._root + path
        for file in files:
            os.link(f"{source}/{file}", f"{target}/{file}")

    def receive(self, name: str, slot: str, chunks: Iterable[str], linked: int = 0) -> None:
        """The array has chunks with these CRCs, whose first `linked` are links."""
        path, spec, chunks = node(slot, name), self._form.slots[name][slot], tuple(chunks)
        new = arrays.chunk_names(spec)[linked : len(chunks)]
        if self._before is not None and self._has_before(name):
            metadata = self._before.receipt(path).metadata
        else:
            metadata, new = framing.crc(arrays.metadata(spec, name)), ("zarr.json", *new)
        with self._lock:
            self._receipts[path] = Receipt(metadata, spec.nbytes, chunks)
            self._new[path] = new

    def keep(self, name: str, slot: str) -> None:
        """The array is the one of the generation before, all of it linked."""
        assert self._before is not None, "what is kept is of a generation before"
        path, spec = node(slot, name), self._form.slots[name][slot]
        receipt = self._before.receipt(path)
        os.mkdir(self._root + path)
        self.take(path, ("zarr.json", *arrays.chunk_names(spec)[: len(receipt.chunks)]))
        with self._lock:
            self._receipts[path] = receipt

    def drop(self, name: str, slot: str) -> None:
        """Removes the array, if it was written or kept here."""
        path = node(slot, name)
        with self._lock:
            self._new.pop(path, None)
            self._receipts.pop(path, None)
        if os.path.lexists(self._root + path):
            shutil.rmtree(self._root + path, ignore_errors=True)

    def receipted(self, squares: Mapping[str, float], ranks: Mapping[str, int]) -> Generation:
        """Writes the receipts, with what else is known of the tensors: a whole generation, of which nothing needs to be
        on disk yet."""
        expected = {node(slot, name) for name, slots in self._form.slots.items() for slot in slots}
        lacking = expected ^ self._receipts.keys()
        assert not (self._receipts.keys() - expected if self._form.sparse else lacking), sorted(lacking)[:3]
        data, checksum = framing.encode(
            body_of(Receipts(self._groups, self._receipts, squares or None, ranks or None)),
        )
        write_bytes(self._root + RECEIPTS, data)
        made = Generation(self.directory, self._form, checksum)
        made.synced = False
        return made

    def sync(self, on_step: Callable[[str], None]) -> None:
        """fsync of every file, then of every directory, innermost first, then of that which the generation lies in.
        What is linked is on disk, unless the generation before is not; its new name is in a directory here. Raises
        OSError, and Halt if an fsync failed."""
        on_step("fsync-files")
        if self._before is not None and not self._before.synced:
            sync_tree(self.directory, between=lambda: on_step("fsync-dirs"))
        else:
            files = [f"{self._root}{path}/{name}" for path, names in self._new.items() for name in names]
            sync_all([self._root + RECEIPTS, *files])
            on_step("fsync-dirs")
            sync_all([self._root + path for path in self._receipts])
            sync_all([self._root + path for path in self._groups if path])
            sync_file(self.directory)
        sync_file(self.directory.parent)

    def _has_before(self, name: str) -> bool:
        return self._before is not None and self._before.has(name)
