"""The source of fine-tunes published into a folder. Notifications make it quick; a scan at the start and from time to
time makes sure that nothing is missed.

It looks at the names, sizes and times of files, and at the length that a safetensors file claims in its first bytes;
whether a model is any good is for the gates. A directory that was renamed into place is taken after the settle time;
one that is written in place, when it is whole, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import structlog
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

from continual.config import Settings
from continual.errors import Misconfigured
from continual.records import Event, FileStat
from continual.sources.contract import Sight, Source, SourceKind, Wiring
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


class FolderSource(Source):
    """Watches one folder."""

    name = "watch"
    parks = False

    def __init__(
        self, root: Path, *, settle: float = 5.0, rescan: float = 30.0, clock: Callable[[], float] | None = None
    ) -> None:
        """`settle`: seconds for which a model's files must be still; `rescan`: seconds between two scans at most;
        `clock` stands for the event loop's, for tests."""
        self.root = root
        self.rescan = rescan
        self.scanned = asyncio.Event()
        self.problem: str | None = None
        self._settling = Settling(settle)
        self._clock = clock
        self._log = structlog.get_logger("continual")

    async def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        """Models as they become ready, until `stop` is set. Notifications only hasten the next scan.

        A folder that cannot be reached is looked at again; `problem` says so until it is back.
        """
        loop = asyncio.get_running_loop()
        clock = self._clock or loop.time
        hint = asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(hint.set)

        with _observed(self.root, tell):
            while not stop.is_set():
                hint.clear()
                sightings = await asyncio.to_thread(self._scan)
                now = clock()
                for sighting in self._settling.ready(sightings, now):
                    yield self._event(sighting)
                self.scanned.set()
                soon = self._settling.next_look(sightings, now)
                await first(self.rescan if soon is None else min(soon + 0.01, self.rescan), stop, hint)

    def ready(self) -> list[Event]:
        """The models that are whole, and whose files have been still long enough by their times."""
        return [self._event(sighting) for sighting in scan(self.root) if self._waits(sighting) is None]

    def survey(self) -> Iterator[Sight]:
        """All models in the folder."""
        for sighting in scan(self.root):
            yield Sight(self._event(sighting), waits=self._waits(sighting))

    def is_gone(self, event: Event) -> bool:
        """Whether the path is there no more."""
        return not Path(event.origin).exists()

    def _scan(self) -> list[FolderSighting]:
        found = scan(self.root)
        problem = None if found or self.root.is_dir() else f"{self.root}: the folder cannot be reached"
        if problem is not None and self.problem is None:
            self._log.warning("scan failed", error=problem)
        self.problem = problem
        return found

    def _event(self, sighting: FolderSighting) -> Event:
        return Event("folder", str(sighting.path), sighting.order, self.root)

    def _waits(self, sighting: FolderSighting) -> str | None:
        """Why a model is not looked at yet, judged by the times of its files; None if it is."""
        name = sighting.path.name
        if not sighting.whole:
            return f"{name}: is not whole: a shard is missing, or shorter than its header says"
        young = self._settling.settle - (time.time() - max(file.mtime_ns for file in sighting.files) / 1e9)
        return f"{name}: is looked at in {young:.0f} s, if its files are still until then" if young > 0 else None


def _check(settings: Settings) -> None:
    """Raises Misconfigured for a folder that is not there, or in which we would see what we write ourselves."""
    ours = [settings.state] + ([settings.current.parent] if settings.current else [])
    for root in settings.watch:
        if not root.is_dir():
            raise Misconfigured(f"watch = {root}: no such directory")
        if found := forbidden(root):
            raise Misconfigured(f"watch = {root}: {found} is a state; keep states outside the watched folders")
        for path in ours:
            if path.resolve().is_relative_to(root.resolve()):
                raise Misconfigured(
                    f"{path} lies in the watched folder {root}: what is published there would be folded again; "
                    "move one of them"
                )


def _make(wiring: Wiring) -> list[FolderSource]:
    settings = wiring.settings
    return [FolderSource(root, settle=settings.settle, rescan=settings.rescan) for root in settings.watch]


KIND = SourceKind(
    name="watch",
    title="folders",
    make=_make,
    wanted=lambda settings: bool(settings.watch),
    check=_check,
    reports=False,  # the status shows the setting
)


class _Hints(FileSystemEventHandler):
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write"):  # our own reads
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._tell()


@contextlib.contextmanager
def _observed(root: Path, tell: Callable[[], None]) -> Iterator[None]:
    """File system notifications below `root`; polling where the kernel gives none, and nothing where `root` is not
    there: the scans find it when it is back."""
    with contextlib.ExitStack() as started:
        for make in (Observer, PollingObserver):
            observer = make()
            try:
                observer.schedule(_Hints(tell), str(root), recursive=True)
                observer.start()
            except OSError:
                continue
            started.callback(observer.join)
            started.callback(observer.stop)
            break
        yield
