"""The source of fine-tunes published into a folder: it looks when the kernel tells of a change, when a model's settle
time is over, and from time to time, and gives what is new.

What is in the folder `tree.py` knows, what makes a model `directories.py`, when one is still `settling.py`. What is
settled is known by its key and not given. A directory that was renamed into place is taken after the settle time; one
that is written in place, when it is whole, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import structlog

from continual.config import Settings
from continual.errors import Misconfigured
from continual.records import Candidate, Event
from continual.sources import directories
from continual.sources.contract import Sight, Source, SourceKind, SourceReport, Wiring
from continual.sources.directories import FolderSighting, forbidden, shown
from continual.sources.notices import Notices
from continual.sources.settling import Settling
from continual.sources.tree import Looking, Tree
from continual.sources.waiting import apart, first

_HUNG = 60.0
"""Seconds after which a file system that does not answer is called a problem."""
_NAP = 0.05
"""Seconds between two looks at least: changes come in bursts."""
_LONGEST_NAP = 1.0
_LOGGED = 20
"""Notes of one look that are logged."""


class FolderSource(Source):
    """Watches one folder."""

    name = "watch"
    parks = False

    def __init__(
        self,
        root: Path,
        *,
        settle: float = 5.0,
        looking: Looking | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`settle`: seconds for which a model's files must be still; `looking` says how often is looked, and what is
        known; `clock` stands for the event loop's, for tests."""
        self.root = root
        self.scanned = asyncio.Event()
        self.problem: str | None = None
        self._settle = settle
        self._looking = looking or Looking()
        self._tree = Tree(str(root.absolute()), Settling(settle), self._looking)
        self._hint = asyncio.Event()
        self._retried: deque[str] = deque()
        self._clock = clock
        self._notes: tuple[str, ...] = ()
        self._told: deque[tuple[str, str]] = deque()
        self._open: set[str] = set()
        self._full = 0.0
        self._log = structlog.get_logger("continual")

    async def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        """Models as they become ready, until `stop` is set. Notices only hasten the next look.

        A folder that cannot be reached is looked at again; `problem` says so until it is back.
        """
        clock = self._clock or asyncio.get_running_loop().time
        hint = self._hint
        with self._noticed(hint):
            while not stop.is_set():
                hint.clear()
                begun = time.monotonic()
                found = await self._apart(clock(), stop)
                if found is None:
                    return
                for sighting in found:
                    event = self._event(sighting)
                    self._open.add(event.origin)
                    yield event
                self.scanned.set()
                nap = min(_LONGEST_NAP, max(_NAP, 10 * (time.monotonic() - begun)))
                await first(self._wait(clock()), stop, hint)
                if hint.is_set():
                    await first(nap, stop)

    def ready(self) -> list[Event]:
        """The models that are whole, whose files have been still long enough by their times, and that are not known."""
        found = scan(self.root, nested=self._looking.nested, known=self._looking.known)
        return [self._event(sighting) for sighting in found if self._waits(sighting) is None]

    def survey(self) -> Iterator[Sight]:
        """All models in the folder."""
        for sighting in scan(self.root, nested=self._looking.nested):
            yield Sight(self._event(sighting), key=self._known_as(sighting), waits=self._waits(sighting))

    def settled(self, event: Event, key: str | None) -> None:
        """Notes under which key a model is settled, so that it is given again if it is to be looked at again."""
        self._open.discard(event.origin)
        if key is not None:
            self._told.append((event.origin, key))

    def again(self, candidates: Sequence[Candidate]) -> None:
        """Looks at once at these candidates."""
        self._retried.extend(candidate.origin for candidate in candidates)
        self._hint.set()

    def is_gone(self, event: Event) -> bool:
        """Whether the path is there no more."""
        try:
            os.stat(event.origin)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # it may be there: who opens it says what is wrong
        return False

    def report(self) -> SourceReport:
        """How many models it has seen that are not settled."""
        return SourceReport(problem=self.problem, seen=len(self._open) + len(self._tree.settling.waiting))

    def notes(self) -> tuple[str, ...]:
        """What lies in the folder and is no model."""
        return self._notes

    async def _apart(self, now: float, stop: asyncio.Event) -> list[FolderSighting] | None:
        """Looks, on a thread of its own; None if it was stopped before the file system answered."""
        look = asyncio.ensure_future(apart(lambda: self._look(now)))
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not look.done():
                await asyncio.wait({look, stopped}, timeout=_HUNG, return_when=asyncio.FIRST_COMPLETED)
                if stopped.done() and not look.done():
                    return None
                if not look.done():
                    self._trouble(f"{shown(str(self.root))}: the file system has not answered for {_HUNG:.0f} s")
                    self.scanned.set()  # the other sources are not held up
            return look.result()
        finally:
            stopped.cancel()
            look.cancel()

    def _look(self, now: float) -> list[FolderSighting]:
        """Looks at what changed and what is due; called on the thread that looks."""
        tree = self._tree
        while self._told:
            tree.settled(*self._told.popleft())
        told = tree.notices.take() if tree.notices is not None else None
        changed = {self._retried.popleft() for _ in range(len(self._retried))}
        begun = time.thread_time()
        self._lost |= told is not None and told.lost
        everything = self._lost and now >= self._full
        found = tree.look(now, changed.union(told.changed if told is not None else ()), everything=everything)
        if everything:
            self._lost = False
            self._full = now + 10 * (time.thread_time() - begun)
        self._trouble(tree.problem)
        self._tell()
        return found

    _lost = False
    """Notices were lost, and nothing was done about it yet."""

    def _wait(self, now: float) -> float:
        """Seconds until it looks if nothing is told."""
        wait = self._tree.next_look(now)
        return min(wait, max(0.0, self._full - now)) if self._lost else wait

    def _trouble(self, problem: str | None) -> None:
        """Says what keeps it from looking, and logs it once."""
        if problem is not None and self.problem is None:
            self._log.warning("scan failed", error=problem)
        self.problem = problem

    def _tell(self) -> None:
        """Publishes the notes, and logs those that are new."""
        notes = [note for _, note in sorted(self._tree.noted.said.items())]
        if (notices := self._tree.notices) is None and self._unnoticed is not None:
            notes.append(self._unnoticed)
        elif notices is not None and notices.unwatched:
            notes.append(
                f"{shown(str(self.root))}: the kernel does not tell of {len(notices.unwatched)} folders, because of "
                "its limit; they are looked at in turn. Raise it: sysctl fs.inotify.max_user_watches=1048576"
            )
        before = set(self._notes)
        new = [note for note in notes if note not in before]
        for note in new[:_LOGGED]:
            self._log.info("seen and left", note=note)
        if len(new) > _LOGGED:
            self._log.info("seen and left", note=f"and {len(new) - _LOGGED} more")
        self._notes = tuple(notes)

    _unnoticed: str | None = None
    """Why the kernel tells of nothing."""

    @contextlib.contextmanager
    def _noticed(self, hint: asyncio.Event) -> Iterator[None]:
        """Has the kernel tell of what happens in the folder, while the block runs, where it can; `hint` is set."""
        loop = asyncio.get_running_loop()

        def heard() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                loop.call_soon_threadsafe(hint.set)

        try:
            notices = Notices(heard)
        except OSError as error:
            self._unnoticed = (
                f"{shown(str(self.root))}: the kernel tells of no changes ({error.strerror}); "
                f"the folder is looked at every {self._looking.rescan:g} s"
            )
            yield
            return
        self._tree.notices = notices
        self._lost = bool(self._tree.nodes)  # of what was seen before the kernel is to tell again
        try:
            yield
        finally:
            self._tree.notices = None
            notices.close()

    def _event(self, sighting: FolderSighting) -> Event:
        return Event("folder", sighting.path, sighting.order, self.root)

    def _known_as(self, sighting: FolderSighting) -> str | None:
        """The key under which a model is settled, if it is."""
        with contextlib.suppress(OSError):
            keys = directories.keys(sighting, directories.listed(sighting.path))
            return next((key for key in keys if self._looking.known(key)), None)
        return None

    def _waits(self, sighting: FolderSighting) -> str | None:
        """Why a model is not looked at yet, judged by the times of its files; None if it is."""
        name = shown(os.path.basename(sighting.path))
        if not sighting.whole:
            return f"{name}: is not whole: a shard is missing, or shorter than its header says"
        young = self._settle - (time.time() - max(file.mtime_ns for file in sighting.files) / 1e9)
        return f"{name}: is looked at in {young:.0f} s, if its files are still until then" if young > 0 else None


def scan(
    root: Path, *, nested: bool = False, known: Callable[[str], bool] = lambda _key: False
) -> list[FolderSighting]:
    """Every model directory below `root` that is not `known`, at most three levels deep, in the order in which they are
    to be folded."""
    settling = Settling(float("inf"))
    Tree(str(root.absolute()), settling, Looking(nested=nested, known=known)).look(0.0)
    return sorted((w.sighting for w in settling.waiting.values()), key=lambda s: (s.order, s.path))


def _check(settings: Settings) -> None:
    """Raises Misconfigured for a folder that is not there, or in which we would see what we write ourselves."""
    ours = [path for path in (settings.state, settings.current and settings.current.parent) if isinstance(path, Path)]
    for root in settings.watch:
        if not os.path.isdir(root):
            raise Misconfigured(f"watch = {root}: no such directory")
        if found := forbidden(root):
            raise Misconfigured(f"watch = {root}: {found} is a state; keep states outside the watched folders")
        for path in ours:
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
                raise Misconfigured(
                    f"{path} lies in the watched folder {root}: what is published there would be folded again; "
                    "move one of them"
                )


def _make(wiring: Wiring) -> list[FolderSource]:
    settings = wiring.settings
    looking = Looking(settings.rescan, settings.nested, wiring.known)
    return [FolderSource(root, settle=settings.settle, looking=looking) for root in settings.watch]


KIND = SourceKind(
    name="watch",
    title="folders",
    make=_make,
    wanted=lambda settings: bool(settings.watch),
    check=_check,
    reports=False,  # the status shows the setting
)
