"""The directory of a generation while it is written: the files of its arrays, new ones and links to those of the
generation before, their receipts, and what of them is not on disk yet. What the values are is the matter of
transaction.py."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from continual.state import arrays, framing, storing
from continual.state.fields import body_of
from continual.state.format import Format
from continual.state.generation import Generation, Receipt, Receipts, ReceiptTogether
from continual.state.layout import Location
from continual.state.names import RECEIPTS
from continual.stores import Where


class ArrayWritten(NamedTuple):
    """What another process wrote of one accumulator: the CRCs of its chunks, and of its zarr.json where the array is
    its own."""

    chunks: tuple[str, ...]
    metadata: str | None


class Draft:
    """A generation of the form `form` in `directory`, on `before` (None: zeros). Threads may share it, as long as each
    tensor is one thread's. Whatever the disk refuses is an OSError."""

    def __init__(self, directory: Where, form: Format, before: Generation | None) -> None:
        self.directory = directory
        self._root = storing.stem(directory)
        self._several = storing.Several(directory)
        self._form = form
        self._layout = form.layout
        self._before = before
        self._chunks: dict[Location, tuple[str, ...]] = {}
        """The CRCs of what is whole."""
        self._begun: set[Location] = set()
        self._new: dict[Location | None, list[str]] = {None: []}
        """The files that were written here, of no place those that are there from the beginning; all others are links.
        """
        self._metadata: dict[str, str] = {}
        """The CRC of each zarr.json, by the path of its group or array."""
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Makes the directory, with its groups, and the arrays of several tensors."""
        metadata = arrays.group_metadata()
        for path in self._layout.groups:
            storing.directory(self._at(path))
            self._several.do(storing.write_new, self._at(f"{path}/zarr.json"), metadata)
            self._new[None].append(f"{path}/zarr.json")
            self._metadata[path] = framing.crc(metadata)
        for path, array in self._layout.together.items():
            storing.directory(self._at(path))
            if self._before is None:
                self._describe(path, array.metadata(), None)
            else:
                self.take([f"{path}/zarr.json"])
                self._metadata[path] = self._before.receipts.metadata_of(path)

    def begin_apart(self) -> None:
        """Makes the directory for parts that another draft takes: with the directories of groups and of arrays of
        several tensors, and nothing in them. Raises OSError; the directory around it has to be there."""
        for path in (*self._layout.groups, *self._layout.together):
            storing.directory(self._at(path))

    def taken(self) -> dict[Location, ArrayWritten]:
        """What became whole since this was last asked, by its place. It is not dropped any more."""
        self._several.wait()
        with self._lock:
            found = {
                place: ArrayWritten(chunks, self._metadata.get(place.array) if place.number is None else None)
                for place, chunks in self._chunks.items()
            }
            self._chunks.clear()
            self._begun.clear()
        return found

    def take_over(self, directory: Where, written: Mapping[Location, ArrayWritten]) -> None:
        """Takes accumulators that another process wrote into `directory` and synced: the files are renamed. Raises
        OSError."""
        for place, array in written.items():
            for file in [place.array] if place.number is None else place.files(len(array.chunks)):
                self._several.do(storing.rename, directory / file, self.directory / file)
            with self._lock:
                self._begun.add(place)
                self._chunks[place], self._new[place] = array.chunks, []
                if array.metadata is not None:
                    self._metadata[place.array] = array.metadata

    def sync_apart(self) -> None:
        """fsync of all that was written here, for another draft to take. Raises OSError, and Halt if an fsync
        failed."""
        self._several.wait()
        storing.sync_all([self._at(file) for file in itertools.chain.from_iterable(self._new.values())])

    def ready(self, place: Location, name: str, slot: str) -> storing.Stem:
        """Makes ready to write an accumulator, and returns what the paths of its chunks begin with. The zarr.json of an
        array of its own is linked from the generation before where there is one: it is the same."""
        with self._lock:
            self._begun.add(place)
            self._new[place] = []
        if place.number is None:
            storing.directory(self._at(place.array))
            if self._has_before(name):
                self._take_metadata(place)
            else:
                self._describe(place.array, self._layout.metadata(name, slot), place)
        return self._at(place.stem)

    def take(self, files: Iterable[str]) -> None:
        """Takes files from the generation before. Raises Damaged where one is missing there; on an object store
        `receipted` may raise it."""
        assert self._before is not None, "what is linked is of a generation before"
        for file in files:
            self._several.do(_taken, self._before.path(file), self._at(file))

    def receive(self, place: Location, chunks: Iterable[str], linked: int = 0) -> None:
        """An accumulator has chunks with these CRCs, whose first `linked` are links."""
        found = tuple(chunks)
        with self._lock:
            self._chunks[place] = found
            self._new[place] += place.files(len(found))[linked:]

    def keep(self, place: Location) -> None:
        """An accumulator is the one of the generation before, all of it linked."""
        assert self._before is not None, "what is kept is of a generation before"
        chunks = self._before.chunks(place)
        with self._lock:
            self._begun.add(place)
        if place.number is None:
            storing.directory(self._at(place.array))
            self._take_metadata(place)
        self.take(place.files(len(chunks)))
        with self._lock:
            self._chunks[place] = chunks

    def drop(self, place: Location) -> None:
        """Removes an accumulator, if it was written or kept here."""
        with self._lock:
            if place not in self._begun:
                return
        self._several.wait()  # what is on its way must not come after this
        with self._lock:
            self._begun.discard(place)
            self._new.pop(place, None)
            self._chunks.pop(place, None)
        if place.number is None:
            self._metadata.pop(place.array, None)
            storing.drop_tree(self._at(place.array))
            return
        for file in place.files():
            with contextlib.suppress(OSError):
                storing.remove(storing.place(self._at(file)))

    def receipted(self, squares: Mapping[str, float], ranks: Mapping[str, int]) -> Generation:
        """Writes the receipts, with what else is known of the tensors: a whole generation, of which nothing needs to be
        on disk yet."""
        expected = {self._layout.place(name, slot) for name, slots in self._form.slots.items() for slot in slots}
        lacking = expected ^ self._chunks.keys()
        assert not (self._chunks.keys() - expected if self._form.sparse else lacking), sorted(lacking)[:3]
        groups = {path: self._metadata[path] for path in self._layout.groups}
        own = {
            place.array: Receipt(self._metadata[place.array], place.spec.nbytes, chunks)
            for place, chunks in self._chunks.items()
            if place.number is None
        }
        together: dict[str, dict[str, tuple[str, ...]]] = {path: {} for path in self._layout.together}
        for place, chunks in self._chunks.items():
            if place.number is not None:
                together[place.array][str(place.number)] = chunks
        shared = {path: ReceiptTogether(self._metadata[path], chunks) for path, chunks in together.items()}
        receipts = Receipts(groups, own, shared or None, squares or None, ranks or None)
        data, checksum = framing.encode(body_of(receipts))
        self._several.wait()
        storing.write_new(self._at(RECEIPTS), data)
        made = Generation(self.directory, self._form, checksum)
        made.synced = False
        return made

    def sync(self, on_step: Callable[[str], None]) -> None:
        """fsync of every file, then of every directory, innermost first, then of that which the generation lies in.
        What is linked is on disk, unless the generation before is not; its new name is in a directory here. Raises
        OSError, and Halt if an fsync failed."""
        on_step("fsync-files")
        if self._before is not None and not self._before.synced:
            storing.sync_tree(self.directory, between=lambda: on_step("fsync-dirs"))
        else:
            storing.sync_all(
                [self._at(file) for file in (RECEIPTS, *itertools.chain.from_iterable(self._new.values()))]
            )
            on_step("fsync-dirs")
            storing.sync_all([self._at(path) for path in self._metadata if "/" in path])
            storing.sync_all([self._at(path) for path in self._layout.groups if path])
            storing.sync(self.directory)
        storing.sync(self.directory.parent)

    def end(self) -> None:
        """Has nothing on its way any more. Nothing can be written then."""
        self._several.end()

    def _at(self, file: str) -> storing.Stem:
        return storing.below(self._root, file)

    def _has_before(self, name: str) -> bool:
        return self._before is not None and self._before.has(name)

    def _take_metadata(self, place: Location) -> None:
        assert self._before is not None, "what is linked is of a generation before"
        self.take([f"{place.array}/zarr.json"])
        with self._lock:
            self._metadata[place.array] = self._before.receipts.metadata_of(place.array)

    def _describe(self, array: str, metadata: bytes, place: Location | None) -> None:
        """Writes the zarr.json of an array."""
        self._several.do(storing.write_new, self._at(f"{array}/zarr.json"), metadata)
        with self._lock:
            self._new[place].append(f"{array}/zarr.json")
            self._metadata[array] = framing.crc(metadata)


def _taken(source: storing.Stem, target: storing.Stem) -> None:
    try:
        storing.take(source, target)
    except FileNotFoundError:
        if storing.place(source).exists():
            raise
        raise arrays.gone(source) from None
