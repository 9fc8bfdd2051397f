"""Fine-tunes published into a folder: notifications for immediacy, a scan at start and from time to time for certainty.

What is looked at are the names, sizes and times of files, and the length a safetensors file claims in its first bytes;
whether a model is any good is for the gates. Publishing by renaming a finished directory into place is taken up after
the settle time; a directory written in place, when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

from continual.records import Event, FileStat
from continual.sources.waiting import first

INDEX = "model.safetensors.index.json"
MARKS = (INDEX, "model.safetensors", "adapter_config.json")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_UNFINISHED = (".tmp", ".part", ".incomplete")
_DEPTH = 3
_PATIENCE = 60
"""A model that is not whole but has been still for this many settle times is handed on as it is, so that it is refused
with a reason."""


class FolderSighting(NamedTuple):
    """A model directory as it is now. `whole`: every file the index names is there, as long as its header says."""

    path: Path
    files: tuple[FileStat, ...]
    whole: bool
    order: tuple[int, str]


def ignored(name: str) -> bool:
    """Names under which nothing is published yet: hidden ones and those of unfinished downloads."""
    return name.startswith(".") or name.endswith(_UNFINISHED)


def scan(root: Path) -> list[FolderSighting]:
    """Every model directory below `root`, at most three levels deep, in the order in which they are to be folded."""
    return sorted(
        (found for path in _directories(root, _DEPTH) if (found := look(path)) is not None),
        key=lambda s: (s.order, str(s.path)),
    )


def look(path: Path) -> FolderSighting | None:
    """The model in directory `path`, None if there is none or it vanished while it was looked at."""
    with contextlib.suppress(OSError):
        files = {e.name: e for e in os.scandir(path) if not ignored(e.name) and not e.is_dir()}
        mark = next((m for m in MARKS if m in files), None) or next(
            (n for n in sorted(files) if n.endswith((".safetensors", *_PICKLED))), None
        )
        if mark is None:
            return None
        kept = sorted(n for n in files if n.endswith((".safetensors", *_PICKLED)) or n in MARKS or n == "config.json")
        stats = tuple(_stat(path / n) for n in kept)
        return FolderSighting(path, stats, _whole(path, set(files)), (_stat(path / mark).mtime_ns, path.name))
    return None


def forbidden(root: Path) -> Path | None:
    """A state of ours that lies in `root` or that `root` lies in; None if there is none."""
    for path in (*_directories(root, _DEPTH), *root.resolve().parents):
        if (path / "format.json").exists() and (path / "commits").is_dir():
            return path
    return None


def _directories(root: Path, depth: int) -> Iterator[Path]:
    yield root
    if depth == 0:
        return
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(root), key=lambda e: e.name):
            if not ignored(entry.name) and entry.is_dir():
                if entry.is_symlink():
                    yield Path(entry.path)  # not followed further: a link may lead back up
                else:
                    yield from _directories(Path(entry.path), depth - 1)


def _stat(path: Path) -> FileStat:
    try:
        stat = path.stat()
    except FileNotFoundError:  # a dangling link
        stat = path.lstat()
    return FileStat(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _whole(path: Path, present: set[str]) -> bool:
    """Whether everything that belongs to the model is there and as long as it says. A malformed file counts as whole:
    it is refused, not waited for."""
    if "adapter_config.json" in present:
        return bool({"adapter_model.safetensors", "adapter_model.bin"} & present) and all(
            map(_complete, path.glob("adapter_model.safetensors"))
        )
    wanted = {n for n in present if n.endswith(".safetensors")}
    if INDEX in present and "model.safetensors" not in present:
        try:
            shards = json.loads((path / INDEX).read_bytes())["weight_map"].values()
            wanted = {s for s in shards if isinstance(s, str) and s == Path(s).name}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return True
    return wanted <= present and all(_complete(path / n) for n in wanted)


def _complete(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says; True for one whose header makes no sense."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > 100_000_000:
                return size >= 8
            header = json.loads(opened.read(length)) if size >= 8 + length else None
            if header is None:
                return False
            return size >= 8 + length + max(
                (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
            )
    except OSError:
        return False
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return True


@dataclass(slots=True)
class Settling:
    """Decides which sightings are ready: pure, the time is an argument in seconds. The same model as it was is ready
    once."""

    settle: float
    since: dict[Path, tuple[tuple[FileStat, ...], float]] = field(default_factory=dict)
    given: dict[Path, tuple[FileStat, ...]] = field(default_factory=dict)

    def ready(self, sightings: list[FolderSighting], now: float) -> list[FolderSighting]:
        """Those of `sightings` (all there are now) that have been still long enough and were not given before as they
        are."""
        found = []
        seen = {s.path for s in sightings}
        self.since = {path: value for path, value in self.since.items() if path in seen}
        self.given = {path: value for path, value in self.given.items() if path in seen}
        for sighting in sightings:
            files, since = self.since.get(sighting.path, ((), now))
            if files != sighting.files:
                self.since[sighting.path] = (sighting.files, now)
                since = now
            still = now - since
            patience = self.settle if sighting.whole else self.settle * _PATIENCE
            if still >= patience and self.given.get(sighting.path) != sighting.files:
                self.given[sighting.path] = sighting.files
                found.append(sighting)
        return found

    def next_look(self, sightings: list[FolderSighting], now: float) -> float | None:
        """Seconds until one of `sightings` could become ready if nothing changes; None if none waits."""
        waits = [
            self.since[s.path][1] + (self.settle if s.whole else self.settle * _PATIENCE) - now
            for s in sightings
            if s.path in self.since and self.given.get(s.path) != s.files
        ]
        return max(0.0, min(waits)) if waits else None


class FolderSource:
    """Watches one folder. `scanned` is set once the first scan is through."""

    def __init__(
        self, root: Path, *, settle: float = 5.0, rescan: float = 30.0, clock: Callable[[], float] | None = None
    ) -> None:
        self.root = root
        self.rescan = rescan
        self.scanned = asyncio.Event()
        self._settling = Settling(settle)
        self._clock = clock

    def settled(self, place: str, key: str | None) -> None:
        """Nothing: what was given is not given again."""

    async def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        """Models as they become ready, until `stop` is set. Notifications only hasten the next scan."""
        loop = asyncio.get_running_loop()
        clock = self._clock or loop.time
        hint = asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(hint.set)

        with _observed(self.root, tell):
            while not stop.is_set():
                hint.clear()
                sightings = await asyncio.to_thread(scan, self.root)
                now = clock()
                for sighting in self._settling.ready(sightings, now):
                    yield Event("folder", str(sighting.path), sighting.order, self.root)
                self.scanned.set()
                soon = self._settling.next_look(sightings, now)
                await first(self.rescan if soon is None else min(soon + 0.01, self.rescan), stop, hint)


class _Hints(FileSystemEventHandler):
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write"):  # our own reads
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._tell()


@contextlib.contextmanager
def _observed(root: Path, tell: Callable[[], None]) -> Iterator[None]:
    """File system notifications below `root`; polling where the kernel gives none."""
    for make in (Observer, PollingObserver):
        observer = make()
        try:
            observer.schedule(_Hints(tell), str(root), recursive=True)
            observer.start()
            break
        except OSError:
            continue
    try:
        yield
    finally:
        observer.stop()
        observer.join()
