"""What goes out as a canary first, and how far that has come: a file of the state for each view, and for the merge,
so that a kill loses nothing. What is decided of it is recorded in the ledger; then the file goes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from continual.errors import Damaged
from continual.records import OMITTED
from continual.state import framing, storing
from continual.state.durable import environment
from continual.state.fields import body_of, record_of
from continual.stores import Where

DIRECTORY = "canaries"
Phase = Literal["goes out", "watched", "promoted", "failed", "rests"]
_OMITTED = {OMITTED: True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One look at a canary: when (RFC 3339, UTC), what it says of it, and the values that were read."""

    time: str
    verdict: Literal["passed", "failed", "inconclusive"]
    said: str
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRecord:
    """Record `seq` as a canary, of a view or (None) of the merge. `mark`: a digest of what it is; `back`: the record
    that it is to replace, None where nothing was promoted yet. `out`: which outlets are done with this phase;
    `since`: when all had put it out. `by`, `why`: who decided, and what he said. `measured`: the newest
    measurements, the oldest first; `passed`: since when all of them passed. `commit`: of the canary on the Hub;
    `request`: the number of the pull request that it waits in. One that `rests` is no canary: it says which record
    is promoted, whose generation is kept."""

    view: str | None
    seq: int
    mark: str
    back: int | None
    phase: Phase = "goes out"
    out: tuple[str, ...] = ()
    since: str | None = None
    by: str | None = None
    why: str | None = None
    measured: tuple[Measurement, ...] = ()
    measurements: int = 0
    passed: str | None = None
    commit: str | None = field(default=None, metadata=_OMITTED)
    request: int | None = field(default=None, metadata=_OMITTED)

    def decided(self, phase: Literal["promoted", "failed"], by: str, why: str) -> CanaryRecord:
        """The same once somebody, or something, has decided."""
        return replace(self, phase=phase, out=(), by=by, why=why)


class Canaries:
    """The canaries of the state in `path`. Safe from several threads of one process."""

    def __init__(self, path: Where) -> None:
        self._directory = path / DIRECTORY
        self._lock = threading.Lock()
        self.turn = threading.Lock()  # held while somebody looks whether one is to be begun

    def get(self, view: str | None) -> CanaryRecord | None:
        """The canary of a view, or (None) of the merge; None where there is none. Raises Damaged naming a file that
        was altered: without it the canary is begun anew."""
        found = _read(self._file(view))
        return None if found is None or found.phase == "rests" else found

    def all(self) -> list[CanaryRecord]:
        """All canaries, that of the merge first, then by the names of the views. Raises as `get`."""
        found = [one for one in map(_read, files(self._directory)) if one is not None and one.phase != "rests"]
        return sorted(found, key=lambda one: (one.view is not None, one.view or ""))

    def put(self, record: CanaryRecord) -> CanaryRecord:
        """Keeps a canary, in place of the one before of its view; on disk when it returns. Raises Retry."""
        with self._lock:
            self._write(record)
        return record

    def change(self, view: str | None, by: Callable[[CanaryRecord], CanaryRecord]) -> CanaryRecord | None:
        """Has `by` say what becomes of the canary of a view, and returns that; None where there is none. Nobody else
        changes it meanwhile. Raises Retry and Damaged."""
        with self._lock:
            before = self.get(view)
            if before is None:
                return None
            after = by(before)
            if after != before:
                self._write(after)
            return after

    def rest(self, view: str | None, seq: int | None) -> None:
        """Ends the canary of a view: record `seq` is promoted by now, None: nothing is. Raises Retry."""
        with self._lock:
            if seq is None:
                self._remove(self._file(view))
                return
            wanted = CanaryRecord(view=view, seq=seq, mark="", back=None, phase="rests")
            if _read(self._file(view)) != wanted:
                self._write(wanted)

    def keep(self, views: Collection[str | None]) -> None:
        """Removes the files of all views but these: nothing of them goes out as a canary any more. Raises Retry."""
        with self._lock:
            wanted = {self._file(view) for view in views}
            for file in files(self._directory):
                if file not in wanted:
                    self._remove(file)

    def _remove(self, file: Where) -> None:
        if file.exists():
            with environment("cannot end a canary"):
                storing.remove(file)
                storing.sync(self._directory)

    def _write(self, record: CanaryRecord) -> None:
        with environment("cannot keep a canary"):
            if not self._directory.is_dir():
                self._directory.mkdir(exist_ok=True)
                storing.sync(self._directory.parent)
            storing.replace(self._file(record.view), framing.encode(body_of(record))[0])

    def _file(self, view: str | None) -> Where:
        name = "merge" if view is None else hashlib.sha256(view.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self._directory / f"{name}.json"


def files(directory: Where) -> list[Where]:
    """The files of canaries in a directory that may not be there."""
    names = storing.names(directory)
    return [directory / name for name in names if name.endswith(".json") and not name.startswith(".")]


def held(path: Where) -> set[int]:
    """The records of the state in `path` that canaries need: their own, and those that they are to replace. Of a file
    that was altered nothing is known."""
    found: set[int] = set()
    for file in files(path / DIRECTORY):
        try:
            record = _read(file)
        except Damaged:
            continue
        if record is not None:
            found |= {record.seq, record.back or 0}
    return found


def _read(file: Where) -> CanaryRecord | None:
    """What a file says, None where it is not there: another process may end a canary at any time."""
    try:
        return record_of(CanaryRecord, framing.decode(file)[0], file)
    except Damaged as error:
        if not file.exists():
            return None
        raise Damaged(f"{error}; remove the file: what goes out is then begun anew as a canary") from None
