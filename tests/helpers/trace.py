"""What a piece of code does to a directory, as the kernel is told: which files it opens to write, which names it makes
or takes away, and what has been fsynced when. And from that, what a power cut would leave.

The names come from Python's own audit events, so no function of ours is replaced; of `os` only `fsync` is wrapped,
which has no event. A file counts as synced with the contents it had when its fsync began, a directory with the names.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Contents = bytes | Mapping[str, int]
"""Of a file its bytes; of a directory its names and their inodes; of a symbolic link where it points."""


class Event(NamedTuple):
    """`what` is `open` (to write), `rename`, `link`, `symlink`, `remove` or `fsync`; `path` the name that is made,
    taken away or synced; `source` the name that `rename` and `link` begin with; `inode` and `contents` are those of an
    fsync."""

    what: str
    path: Path
    source: Path | None = None
    inode: int = 0
    contents: Contents = b""


@dataclass
class Trace:
    """The events below `root`, in order. An fsync stands where it has ended, all else where it begins: so an fsync that
    stands before a name was there before it."""

    root: Path
    events: list[Event] = field(default_factory=list)
    trees: list[Mapping[int, Contents]] = field(default_factory=list)
    """Every inode below `root` as it was at each event, and once more at the end, where that was asked for."""
    with_trees: bool = False

    def names(self) -> list[Path]:
        """Every name that was made by a rename, a link or a symbolic link, temporary ones aside."""
        made = [e.path for e in self.events if e.what in ("rename", "link", "symlink")]
        return [path for path in made if not path.name.endswith(".tmp")]

    def appeared(self, path: Path) -> int:
        """The event by which `path` got its name."""
        found = [i for i, e in enumerate(self.events) if e.path == path and e.what in ("rename", "link", "symlink")]
        assert found, f"{path} did not appear by a rename or a link: {self._told()}"
        return found[-1]

    def removed(self, directory: Path) -> int:
        """The first event by which something below `directory` went."""
        return next(i for i, e in enumerate(self.events) if e.what == "remove" and directory in e.path.parents)

    def synced(self, path: Path, *, after: int = -1, before: int | None = None) -> int:
        """The first event after `after` and before `before` by which `path` was synced as it is now."""
        inode, contents = os.lstat(path).st_ino, contents_of(path)
        for i, event in enumerate(self.events[:before]):
            if i > after and event.what == "fsync" and (event.inode, event.contents) == (inode, contents):
                return i
        raise AssertionError(f"{path} was not synced as it is after event {after} and before {before}: {self._told()}")

    def listed(self, path: Path, *, after: int = -1, before: int | None = None) -> int:
        """The first event after `after` and before `before` by which the directory of `path` was synced with that name
        for that inode."""
        directory, inode = os.lstat(path.parent).st_ino, os.lstat(path).st_ino
        for i, event in enumerate(self.events[:before]):
            listing = {} if isinstance(event.contents, bytes) else event.contents
            if i > after and event.inode == directory and listing.get(path.name) == inode:
                return i
        raise AssertionError(f"{path.parent} was not synced with {path.name} after event {after}: {self._told()}")

    def whole(self, directory: Path, *, before: int) -> None:
        """Asserts that every file and directory from `directory` down was synced as it is before the event `before`."""
        for path in (directory, *directory.rglob("*")):
            self.synced(path, before=before)

    def _told(self) -> str:
        return "\n".join(["", *(f"{i:3} {e.what:7} {e.path}" for i, e in enumerate(self.events))])


def contents_of(path: Path) -> Contents:
    """What an fsync of `path` would make durable."""
    if path.is_symlink():
        return os.readlink(path).encode()
    if path.is_dir():
        return {entry.name: entry.inode() for entry in os.scandir(path)}
    return path.read_bytes()


@contextlib.contextmanager
def traced(root: Path, *, trees: bool = False) -> Iterator[Trace]:
    """Records what the block does below `root`, in any thread of this process."""
    global _now
    _install()
    trace, fsync, held = Trace(root, with_trees=trees), os.fsync, list[int]()

    def wrapped(fd: Any) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path != root and root not in path.parents:
            fsync(fd)
            return
        inode, contents = os.fstat(fd).st_ino, contents_of(path)
        held.append(os.dup(fd))  # an inode that is held is not given to another file
        fsync(fd)
        with _lock:
            _add(trace, Event("fsync", path, None, inode, contents))

    os.fsync, _now = wrapped, trace
    try:
        yield trace
    finally:
        os.fsync, _now = fsync, None
        if trees:
            trace.trees.append(tree(root))
        for fd in held:
            os.close(fd)


@contextlib.contextmanager
def at_event(name: str, path: Path, action: Callable[[], object]) -> Iterator[list[str]]:
    """Calls `action` when Python is about to do what the audit event `name` says (`open`, `os.listdir`, `os.rename`, …)
    with `path`, the first time in the block. Yields a list that then has the event's name."""
    global _interruption
    _install()
    done: list[str] = []

    def interrupt(heard: str, args: tuple[object, ...]) -> None:
        if heard == name and not done and args and isinstance(args[0], str | os.PathLike) and Path(args[0]) == path:
            done.append(heard)
            action()

    _interruption = interrupt
    try:
        yield done
    finally:
        _interruption = None


_interruption: Callable[[str, tuple[object, ...]], None] | None = None
_now: Trace | None = None
_lock = threading.RLock()
_installed = False


def _install() -> None:
    global _installed
    if not _installed:
        sys.addaudithook(_heard)
        _installed = True


def _heard(name: str, args: tuple[object, ...]) -> None:
    if _interruption is not None:
        _interruption(name, args)
    trace = _now
    if trace is None or name not in _EVENTS:
        return
    event = _EVENTS[name](args)
    if event is not None and trace.root in event.path.parents:
        with _lock:
            _add(trace, event)


def _add(trace: Trace, event: Event) -> None:
    trace.events.append(event)
    if trace.with_trees:
        trace.trees.append(tree(trace.root))


def tree(root: Path) -> Mapping[int, Contents]:
    """Every inode from `root` down, as it is."""
    found: dict[int, Contents] = {}
    for path in (root, *root.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            found[os.lstat(path).st_ino] = contents_of(path)
    return found


def _path(name: object, directory: object = -1) -> Path:
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else Path("/")
    if not path.is_absolute() and isinstance(directory, int) and directory >= 0:
        return Path(os.readlink(f"/proc/self/fd/{directory}")) / path
    return path.absolute()


def _opened(args: tuple[object, ...]) -> Event | None:
    path, _mode, flags = args
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int)
    return Event("open", _path(path)) if writes else None


_EVENTS: Mapping[str, Callable[[Any], Event | None]] = {
    "open": _opened,
    "os.rename": lambda a: Event("rename", _path(a[1], a[3]), _path(a[0], a[2])),
    "os.link": lambda a: Event("link", _path(a[1], a[3]), _path(a[0], a[2])),
    "os.symlink": lambda a: Event("symlink", _path(a[1], a[2])),
    "os.remove": lambda a: Event("remove", _path(a[0], a[1])),
}


def power_cuts(trace: Trace, start: Mapping[int, Contents]) -> Iterator[tuple[int, Mapping[int, Contents]]]:
    """What a power cut may leave of `root` at each event and at the end, as (event, inodes), where `start` was on disk
    at the beginning. Two disks, which bound those that there are: one keeps nothing that was not synced; the other
    keeps every name at once, but of a file that was not synced nothing."""
    root = os.lstat(trace.root).st_ino
    disk = dict(start)
    seen: list[Mapping[int, Contents]] = []
    for number, found in enumerate(trace.trees):
        if number < len(trace.events) and trace.events[number].what == "fsync":
            disk[trace.events[number].inode] = trace.events[number].contents
        names = {inode: contents for inode, contents in found.items() if not isinstance(contents, bytes)}
        empty = dict.fromkeys(found, b"")
        for left in (disk, {**empty, **disk, **names}):
            image = _reachable(left, root)
            if image not in seen:
                seen.append(image)
                yield number, image


def _reachable(disk: Mapping[int, Contents], inode: int) -> Mapping[int, Contents]:
    found: dict[int, Contents] = {inode: disk.get(inode, b"")}
    contents = found[inode]
    if not isinstance(contents, bytes):
        for child in contents.values():
            found |= _reachable(disk, child)
    return found


def write(image: Mapping[int, Contents], inode: int, path: Path) -> None:
    """Makes the file or directory `inode` of an image at `path`."""
    contents = image[inode]
    if isinstance(contents, bytes):
        path.write_bytes(contents)
        return
    path.mkdir()
    for name, child in contents.items():
        write(image, child, path / name)
