"""What lies in the directory of a state and belongs to no part of the format (FORMAT.md), or is left over: named with
its size. None of it is damage, and nothing is removed here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass

from continual.errors import Damaged, Misconfigured, Retry
from continual.state import canaries, excerpts, paused, storing, task_inputs
from continual.state.format import Format
from continual.state.generation import Generation, Receipts
from continual.state.ledger import Ledger
from continual.state.names import RECEIPTS
from continual.state.opening import PARTIAL
from continual.stores import Where

ASIDE = ".repaired-"
"""What the name of a directory begins with in which a repair keeps the old files."""
CONTROL = "control.sock"
"""The socket of a running daemon."""

_RECORD = re.compile(r"\d{8,}\.json")
_LOCKS = re.compile(r"\d{8,}\.json|\.probe-[0-9a-f]{16}")
_LEASE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
_FRAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.json")
_TEMPORARY = re.compile(r"\..+\.tmp")
_FILES = ("format.json", "HEAD", "FORMAT.md", PARTIAL, paused.NAME)
_UNKNOWN = "no part of the format"
_UNNAMED = "no receipt is for it: continual does not read it, and other readers of Zarr may take it for values"
_WRITING = "being written, or left by a writer that died: it goes when the state is next opened for writing"


@dataclass(frozen=True, slots=True)
class Stray:
    """A file or directory, by its path below the state. `nbytes`: of it, and of all that is in it; `what` says what it
    is."""

    path: str
    nbytes: int
    what: str


def strays(path: Where, form: Format, ledger: Ledger) -> list[Stray]:
    """The strays of the state in `path`, in order of their paths. What goes away while it is looked at is left out."""
    found: list[Stray] = []
    for entry in _entries(path):
        name = entry.name
        if name == "commits":
            found += _in(entry, "commits", _RECORD)
        elif name == excerpts.DIRECTORY:
            found += _in(entry, name, _RECORD)
        elif name in ("tags", "sources", "inbox", canaries.DIRECTORY):
            found += _tags(entry, ledger) if name == "tags" else _in(entry, name, _FRAMED)
        elif name == "leases":
            found += _in(entry, name, _LEASE)
        elif name == "generations":
            found += _generations(entry, form, {name: c.receipts or "" for name, c in ledger.generations.items()})
        elif name == task_inputs.DIRECTORY:
            found += _inputs(entry, {one.task.id for one in task_inputs.in_force(ledger)})
        elif name == "staging":
            found.append(_stray(entry, "staging", "a release on its way; it goes when the next begins"))
        elif name.startswith(ASIDE):
            found.append(_stray(entry, name, "what a repair kept aside: delete it when nothing of it is needed"))
        elif _TEMPORARY.fullmatch(name):
            found.append(_stray(entry, name, _WRITING))
        elif name == "lock":
            found += _in(entry, name, _LOCKS)
        elif name not in _FILES and not (name == CONTROL and entry.is_socket()):
            found.append(_stray(entry, name, _UNKNOWN))
    return sorted((stray for stray in found if stray.nbytes >= 0), key=lambda stray: stray.path)


def _in(directory: Where, name: str, pattern: re.Pattern[str]) -> Iterator[Stray]:
    """The strays in a directory that has files whose names match."""
    for entry in _entries(directory):
        if _TEMPORARY.fullmatch(entry.name):
            yield _stray(entry, f"{name}/{entry.name}", _WRITING)
        elif not pattern.fullmatch(entry.name) or not entry.is_file():
            yield _stray(entry, f"{name}/{entry.name}", _UNKNOWN)


def _tags(directory: Where, ledger: Ledger) -> Iterator[Stray]:
    yield from _in(directory, "tags", _FRAMED)
    known = ledger.tags
    for entry in _entries(directory):
        if _FRAMED.fullmatch(entry.name) and entry.is_file() and entry.stem not in known:
            yield _stray(entry, f"tags/{entry.name}", "no record names this tag")


def _generations(directory: Where, form: Format, known: dict[str, str]) -> Iterator[Stray]:
    groups = {group for group in form.layout.groups if group}
    for generation in _entries(directory):
        name = f"generations/{generation.name}"
        if generation.name not in known:
            yield _stray(generation, name, f"a generation that no record names; {_WRITING}")
            continue
        arrays = _arrays(Generation(generation, form, known[generation.name]))
        for entry in _entries(generation):
            if entry.name not in groups:
                if entry.name not in ("zarr.json", RECEIPTS):
                    yield _stray(entry, f"{name}/{entry.name}", _UNKNOWN)
                continue
            for array in _entries(entry):
                inner = f"{entry.name}/{array.name}"
                if inner not in arrays:
                    if array.name != "zarr.json":
                        yield _stray(array, f"{name}/{inner}", _UNKNOWN)
                    continue
                for file in _entries(array):
                    if file.name not in arrays[inner]:
                        yield _stray(file, f"{name}/{inner}/{file.name}", _UNNAMED)


def _inputs(directory: Where, known: Set[str]) -> Iterator[Stray]:
    for entry in _entries(directory):
        if entry.name not in known:
            what = f"inputs of a task that were read again, or that no record names; {_WRITING}"
            yield _stray(entry, f"{task_inputs.DIRECTORY}/{entry.name}", what)


def _arrays(generation: Generation) -> dict[str, set[str]]:
    """The names of the files in each array, by its path, that the receipts of a generation are for; where they cannot
    be read, which is damage, of all that there may be."""
    receipts: Receipts | None = None
    with contextlib.suppress(Damaged, Misconfigured, Retry):
        receipts = generation.receipts
    found: dict[str, set[str]] = {}
    for place in generation.form.layout.places():
        chunks = receipts.chunks(place) if receipts is not None else place.files()
        if place.number is None and chunks is None:
            continue
        cut = len(place.array) + 1
        files = place.files(len(chunks or ()))
        found.setdefault(place.array, {"zarr.json"}).update(file[cut:] for file in files)
    return found


def _entries(directory: Where) -> list[Where]:
    """What is in a directory; nothing where there is none."""
    return [directory / name for name in storing.names(directory)]


def _stray(entry: Where, name: str, what: str) -> Stray:
    """The stray at `entry`; of −1 bytes where it has gone meanwhile."""
    return Stray(name, storing.weight(entry), what)
