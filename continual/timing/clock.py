"""A clock for the stages of a piece of work: wall time, CPU time and bytes, of every thread that has a part in it.

Whoever does the work says `with stage("read", nbytes)`, and whoever wants to know where the time goes does the work
within `profiled`. Where nobody wants to know, a stage costs one look at a variable.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TypeVar

T = TypeVar("T")
STAGES = ("open", "gates", "read", "hash", "checksum", "compute", "write", "fsync", "commit", "other")
"""Every stage, in the order in which they are shown. `open`: libraries, state, base and headers. `hash`: BLAKE3 of what
is folded; `checksum`: CRC-32C of the state. `compute`: what a task does besides."""
WAITING = "waiting"
"""The thread that hands out tasks waits for them: their time is that of other threads."""


@dataclass(slots=True)
class Spent:
    """What went into a stage: wall seconds, CPU seconds, bytes; of several threads it is their sum. `first` and `last`:
    when it was begun first and left last, as `time.perf_counter` says."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    nbytes: int = 0
    first: float = field(default=math.inf, compare=False)
    last: float = field(default=0.0, compare=False)

    def add(self, other: Spent) -> None:
        """Adds what went into the same elsewhere."""
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds
        self.nbytes += other.nbytes
        self.first = min(self.first, other.first)
        self.last = max(self.last, other.last)


class Watch(Protocol):
    """What `stage` gives: a context."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Track:
    """The time of one thread from its beginning on: at each moment it is in one stage, the innermost that it was told
    of. `name`: the tensor that is worked on; empty on the thread that has the work done."""

    def __init__(self, name: str, stage: str) -> None:
        self.name = name
        self.spent: dict[str, Spent] = {}
        self._stage = stage
        self._last = time.perf_counter(), time.thread_time()

    def turn(self, stage: str) -> str:
        """From now on it is in `stage`. Returns the one before."""
        now = time.perf_counter(), time.thread_time()
        self._of(self._stage).add(Spent(now[0] - self._last[0], now[1] - self._last[1], 0, self._last[0], now[0]))
        self._last = now
        before, self._stage = self._stage, stage
        return before

    def count(self, stage: str, nbytes: int) -> None:
        """Adds bytes to a stage."""
        self._of(stage).nbytes += nbytes

    def _of(self, stage: str) -> Spent:
        return self.spent.setdefault(stage, Spent())


class _Off:
    """The stage where nobody wants to know."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _On:
    """A stage of a track."""

    __slots__ = ("_before", "_stage", "_track")

    def __init__(self, track: Track, stage: str) -> None:
        self._track, self._stage = track, stage

    def __enter__(self) -> None:
        self._before = self._track.turn(self._stage)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._track.turn(self._before)


@dataclass
class Profile:
    """Where the time of a piece of work went.

    `seconds`: wall time from beginning to end. `cpu_seconds`: CPU time of the whole process, of which `stages` says
    what is known. `tracks`: of the thread that had the work done, then of every task.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tracks: list[Track] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, Spent]:
        """What went into each stage, summed over threads, without their waiting for each other. CPU time of threads
        that no stage knows of, as those that sync, counts as `other`."""
        found = {stage: Spent() for stage in STAGES}
        for track in self.tracks:
            for stage, spent in track.spent.items():
                if stage != WAITING:
                    found[stage].add(spent)
        known = sum(spent.cpu_seconds for track in self.tracks for spent in track.spent.values())
        found["other"].cpu_seconds += max(0.0, self.cpu_seconds - known)
        return found

    @property
    def tensors(self) -> dict[str, dict[str, Spent]]:
        """The same of each tensor: those that took most CPU time first."""
        found: dict[str, dict[str, Spent]] = {}
        for track in self.tracks:
            stages = found.setdefault(track.name, {}) if track.name else {}
            for stage, spent in track.spent.items():
                stages.setdefault(stage, Spent()).add(spent)
        return dict(sorted(found.items(), key=lambda row: -sum(spent.cpu_seconds for spent in row[1].values())))


_TRACK: ContextVar[Track | None] = ContextVar("track", default=None)
_PROFILE: ContextVar[Profile | None] = ContextVar("profile", default=None)
_OFF = _Off()


def stage(name: str, nbytes: int = 0) -> Watch:
    """A context whose time, and `nbytes`, go to the stage `name`, but for what a stage within it takes."""
    track = _TRACK.get()
    if track is None:
        return _OFF
    if nbytes:
        track.count(name, nbytes)
    return _On(track, name)


@contextlib.contextmanager
def profiled() -> Iterator[Profile]:
    """Has the time taken of all that is done within, on this thread and in the tasks that it hands out. The profile is
    complete when the block ends."""
    profile = Profile()
    began = time.perf_counter(), time.process_time()
    taken = _PROFILE.set(profile)
    try:
        with _tracked(profile, "", "other"):
            yield profile
    finally:
        _PROFILE.reset(taken)
        profile.seconds = time.perf_counter() - began[0]
        profile.cpu_seconds = time.process_time() - began[1]


def task(name: str, run: Callable[[], T]) -> Callable[[], T]:
    """`run`, whose time goes to the tensor `name` of what is profiled here, on whatever thread it is called."""
    profile = _PROFILE.get()
    if profile is None:
        return run

    def timed() -> T:
        with _tracked(profile, name, "compute"):
            return run()

    return timed


@contextlib.contextmanager
def _tracked(profile: Profile, name: str, stage: str) -> Iterator[None]:
    track = Track(name, stage)
    taken = _TRACK.set(track)
    try:
        yield
    finally:
        _TRACK.reset(taken)
        track.turn(stage)
        profile.tracks.append(track)
