"""Asks every machine of a cluster what it sees of what orders need: the same files, folders to write into, a store."""

from __future__ import annotations

import os
import pickle
import queue
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from continual.errors import ContinualError
from continual.executors.away import answer_of, software
from continual.executors.driving import Came, SendOrder
from continual.executors.links import Answers, ClusterLink
from continual.executors.orders import WorkJob
from continual.stores import Where

FILES = 40
"""Files of a folder that are compared."""
_LOOKED = 1000
"""Entries of it that are looked at to find them."""


class FileSeen(NamedTuple):
    """A file by its path within a folder, its size in bytes and its time; of the folder itself the path is empty."""

    name: str
    size: int
    mtime_ns: int


class PlaceSeen(NamedTuple):
    """A place that orders need, with `files` of it as this machine sees them; `written`: orders write there."""

    path: Where
    files: tuple[FileSeen, ...] = ()
    written: bool = False


class MachineLook(NamedTuple):
    """What a machine found: of each place that is not as it has to be what is wrong with it, and how many bytes of how
    many are free where its programs keep what is temporary."""

    wrong: tuple[tuple[Where, str], ...]
    temporary: str
    free: int
    whole: int


def seen_here(path: Path) -> tuple[FileSeen, ...]:
    """Some regular files below a folder, by their names; the folder itself where it has none. Raises OSError."""
    found: list[FileSeen] = []
    looked = 0
    for directory, inner, names in os.walk(path):
        inner.sort()
        for name in sorted(names):
            file = Path(directory, name)
            looked += 1
            if len(found) >= FILES or looked > _LOOKED:
                return tuple(found)
            if file.is_file() and not file.is_symlink():
                found.append(_seen(path, str(file.relative_to(path))))
    return tuple(found) or (_seen(path, ""),)


def _seen(path: Path, name: str) -> FileSeen:
    found = (path / name).stat()
    return FileSeen(name, found.st_size if name else 0, found.st_mtime_ns)


@dataclass(frozen=True)
class LookJob(WorkJob[MachineLook]):
    """Looks at places, on whichever machine does it."""

    places: tuple[PlaceSeen, ...]

    def open(self) -> LookBench:
        """Nothing: it is looked when it is worked."""
        return LookBench(self.places)


class LookBench:
    """Looks at places on this machine."""

    def __init__(self, places: Sequence[PlaceSeen]) -> None:
        self._places = places

    def work(self, names: Sequence[str]) -> list[MachineLook]:
        """One look for each name."""
        return [self._look() for _ in names]

    def close(self) -> None:
        """Nothing was opened."""

    def _look(self) -> MachineLook:
        wrong = [(place.path, told) for place in self._places for told in _wrong(place)]
        temporary = tempfile.gettempdir()
        usage = shutil.disk_usage(temporary)
        return MachineLook(tuple(wrong), temporary, usage.free, usage.total)


def _wrong(place: PlaceSeen) -> Iterator[str]:
    """What is wrong with a place on this machine: at most one thing of its files, and one of its rights."""
    try:
        if not place.path.exists():
            yield "is not there"
            return
        if isinstance(place.path, Path):
            yield from _other(place.path, place.files)
    except (OSError, ContinualError) as error:
        yield f"cannot be looked at: {error}"
        return
    if place.written and isinstance(place.path, Path) and not os.access(place.path, os.W_OK | os.X_OK):
        yield f"cannot be written to by the user {os.geteuid()}:{os.getegid()}"


def _other(path: Path, files: Sequence[FileSeen]) -> Iterator[str]:
    """The first file that is another one here."""
    for file in files:
        try:
            here = _seen(path, file.name)
        except FileNotFoundError:
            yield f"has no {file.name}"
            return
        if here != file:
            yield f"has another {file.name}" if file.name else "is another folder, by its time"
            return


def ask_machines(
    link: ClusterLink, places: Sequence[PlaceSeen], seconds: float
) -> Iterator[tuple[str, MachineLook | str]]:
    """What each node of a cluster that is alive finds of these places, by its machine's address, as it comes: or, in
    words, why it finds nothing. After so many seconds no more is waited for."""
    job, answers, begun = LookJob(secrets.token_hex(8), tuple(places)), Answers(), set[int]()
    link.job(job.id, pickle.dumps(job))
    options = {"num_cpus": 0, "max_retries": 0, "name": "continual doctor"}
    asked = {
        link.order(SendOrder(0, job.id, ("look",), software(), options, only=str(node["NodeID"])), answers): str(
            node["NodeManagerAddress"]
        )
        for node in link.nodes
    }
    until = time.monotonic() + seconds
    try:
        while asked and (left := until - time.monotonic()) > 0:
            try:
                came = answers.get(timeout=left)
            except queue.Empty:
                break
            if came is None:
                raise link.gone()
            if isinstance(came, Came):
                yield asked.pop(came.number), _answer(came)
            else:
                begun.add(came.number)
        for number, machine in asked.items():
            why = "a folder may stand still there" if number in begun else "no worker of Ray has started there"
            yield machine, f"has not answered within {seconds:.0f} s: {why}"
    finally:
        for number in asked:
            link.drop(number)
        link.job(job.id, None)


def _answer(came: Came) -> MachineLook | str:
    if came.answer is None:
        return f"cannot do orders: {came.why}"
    answer = answer_of(came.answer)
    if isinstance(answer, str) or answer.error is not None:
        return f"cannot do orders: {answer if isinstance(answer, str) else answer.error}"
    look = answer.results[0]
    assert isinstance(look, MachineLook)
    return look
