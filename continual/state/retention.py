"""Which generations are kept, and for how long: leases of readers, what a record names, what expires. Only whole
directories of generations are deleted; a record never is."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Set
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from continual.errors import Retry
from continual.state import canaries, heartbeat, storing, usage
from continual.state.durable import environment, move_away, trouble
from continual.state.generation import EXPIRED, RECEIPTS, stands
from continual.state.ledger import Ledger
from continual.stores import ObjectPath, Where

_log = logging.getLogger("continual.state")
_LEASES = 3
"""Leases after which nothing comes of what was sent before they began."""


def kept(path: Where, ledger: Ledger) -> list[str]:
    """The generations of the state in `path` that are on disk and named by a record, in order of their names."""
    found = [name for name in _listed(path) if name in ledger.generations]
    return [name for name in found if stands(path / "generations" / name)] if isinstance(path, ObjectPath) else found


def unnamed(path: Where, ledger: Ledger) -> list[str]:
    """The directories below `generations/` that no record names: orphans, and what is being deleted."""
    return [name for name in _listed(path) if name not in ledger.generations]


def dead(path: Where, ledger: Ledger) -> list[str]:
    """Those of `unnamed` that nobody writes any more. On an object store a writer that lost its lease may still write
    what was written a short time ago. Raises OSError."""
    names = unnamed(path, ledger)
    if not isinstance(path, ObjectPath) or not names:
        return names
    now, long = heartbeat.now(path), _LEASES * path.objects.lease

    def is_old(name: str) -> bool:
        written = max((one.modified for one in path.objects.below(f"{path.key}/generations/{name}")), default=None)
        return written is None or heartbeat.ran_out(written, now, long)

    return [name for name in names if name.startswith(EXPIRED) or is_old(name)]


def orphans(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `unnamed` that a writer left which died before its commit."""
    return tuple(name for name in names if not name.startswith(EXPIRED))


class Keep(NamedTuple):
    """How many of the newest generations are kept, and how many bytes they may take on the disk (None: any number). A
    file that several of them share counts once."""

    most: int
    nbytes: int | None = None


def expired(path: Where, ledger: Ledger, keep: Keep, *, then: str | None = None) -> list[str]:
    """The generations on disk that may go: not the one in force, none of the newest as `keep` says, none that a tag
    names or a canary needs, none that a living reader has leased. `then`: as it will be once that generation is put
    in force again. Raises OSError."""
    again = [] if then is None else [then]
    newest = [*again, *islice((g for g in reversed(ledger.generations) if g != then), keep.most)][: keep.most]
    if keep.nbytes is not None:
        newest = _within(path, newest, keep.nbytes)
    tagged = {ledger.get(seq).generation for seq in ledger.tags.values()}
    tagged |= {ledger.get(seq).generation for seq in canaries.held(path) if seq <= ledger.head.seq}
    held = {then or ledger.head.generation, *newest, *tagged, *_leased(path)}
    found = [name for name in kept(path, ledger) if name not in held]
    if isinstance(path, ObjectPath):
        return found
    return [name for name in found if not _is_leased(path / "generations" / name)]


def _within(path: Where, newest: list[str], nbytes: int) -> list[str]:
    """As many of the newest, in this order, as take `nbytes` on the disk together."""
    seen, total = set[int](), 0
    for place, name in enumerate(newest):
        total += taken(path, name, seen)
        if total > nbytes:
            return newest[:place]
    return newest


def taken(path: Where, name: str, seen: set[int]) -> int:
    """Bytes that a generation takes; files whose inodes are in `seen` count as nothing, and those that are counted are
    added to it."""
    at = path / "generations" / name
    return sum(storing.sizes(at).values()) if isinstance(at, ObjectPath) else usage.taken(at, seen)


def expire(path: Where, ledger: Ledger, keep: Keep, may: Callable[[], None]) -> list[str]:
    """Deletes the generations that `expired` names and returns them. What cannot be deleted now is tried again the next
    time, and the log has a line about it. `may` is asked before each, and raises Halt where another process may have
    put it in force by now. Raises Halt if an fsync failed, too."""
    gone: list[str] = []
    try:
        gone.extend(_moved(path, expired(path, ledger, keep), may))
        for name in _listed(path):
            if name.startswith(EXPIRED):
                _remove(path, name)
    except OSError as error:
        _log.warning("%s: old generations stay until the next fold: %s", path, trouble(error))
    return gone


def drop(path: Where, names: Iterable[str]) -> None:
    """Deletes generations of the copy of a state, but those that a reader has leased. Raises OSError and Halt."""
    for name in list(_moved(path, names, lambda: None)):
        _remove(path, f"{EXPIRED}{name}")


def _remove(path: Where, name: str) -> None:
    """Deletes a directory below `generations/`; on an object store, of what expires, first what it stands for."""
    if isinstance(path, ObjectPath) and name.startswith(EXPIRED):
        storing.remove_tree(path / "generations" / name.removeprefix(EXPIRED))
    storing.remove_tree(path / "generations" / name)


def _moved(path: Where, names: Iterable[str], may: Callable[[], None]) -> Iterator[str]:
    """Gives generations that no reader has leased another name, and yields theirs. First of all: a kill while its files
    are deleted must not leave half of a generation under a name that a record knows. On an object store only the
    receipts get another name: without them it is no generation."""
    for name in names:
        may()
        if _moved_away(path / "generations" / name, path / "generations" / f"{EXPIRED}{name}"):
            yield name


def clear(path: Where, names: Iterable[str]) -> None:
    """Deletes what `unnamed` found. What cannot be deleted now is found again at the next open."""
    for name in names:
        if isinstance(path, ObjectPath):
            with contextlib.suppress(OSError):
                _remove(path, name)
        else:
            storing.drop_tree(path / "generations" / name)


@contextlib.contextmanager
def lease(path: Where, generation: str) -> Iterator[None]:
    """Keeps `generation` of the state in `path` from expiring while the block runs, if it has not yet: that is for the
    block to look at. It needs no permission to write, but on an object store, where it is not kept without. Raises
    Retry where the disk gets in the way."""
    if isinstance(path, ObjectPath):
        with _beating(path, generation):
            yield
        return
    with contextlib.ExitStack() as held:
        with environment(f"cannot read the generation {generation}"), contextlib.suppress(FileNotFoundError):
            fd = os.open(path / "generations" / generation / RECEIPTS, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, fd)
            with contextlib.suppress(OSError):  # a file system without locks: nobody can lease there
                fcntl.flock(fd, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _beating(path: ObjectPath, generation: str) -> Iterator[None]:
    """A reader's lease on an object store."""
    at, since = path / "leases" / f"{generation}-{secrets.token_hex(4)}", heartbeat.boottime()
    try:
        with environment(f"cannot read the generation {generation}"):
            at.objects.put_now(at.key, b"")
    except Retry as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        yield
        return
    beat = heartbeat.Heartbeat(at, bytes, lambda: False, since)
    try:
        yield
    finally:
        beat.end()
        with contextlib.suppress(OSError):
            at.unlink()


def _moved_away(generation: Where, target: Where) -> bool:
    """Renames a generation, unless a reader has leased it: the rename and a lease exclude each other."""
    if isinstance(generation, ObjectPath):
        storing.rename(generation / RECEIPTS, target / RECEIPTS)
        return True
    assert isinstance(target, Path)
    with _unless_leased(generation) as free:
        if free:
            move_away(generation, target)
    return free


def _is_leased(generation: Path) -> bool:
    with _unless_leased(generation) as free:
        return not free


@contextlib.contextmanager
def _unless_leased(generation: Path) -> Iterator[bool]:
    """Whether no reader has leased a generation; if so none can while the block runs."""
    try:
        fd = _opened(generation / RECEIPTS)
    except FileNotFoundError:  # damage, which keeps nobody from deleting it
        yield True
        return
    try:
        yield not _is_locked(fd)
    finally:
        os.close(fd)


def _opened(file: Path) -> int:
    """A descriptor to lock `file` with: to write where that may be, since NFS asks for it."""
    try:
        return os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)


def _is_locked(fd: int) -> bool:
    """Whether somebody holds a lock on the open file; if nobody does, it is locked until it is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    return False


def _leased(path: Where) -> Set[str]:
    """The generations that living readers have leased by an object, or by a file."""
    if not isinstance(path, ObjectPath):
        return _leased_by_files(path / "leases")
    listed = list(path.objects.below(f"{path.key}/leases"))
    try:
        now = heartbeat.now(path) if listed else None
    except PermissionError:  # who may only read looks at what would go
        now = None
    over = [one.name for one in listed if now and heartbeat.ran_out(one.modified, now, path.objects.lease)]
    path.objects.delete([f"{path.key}/leases/{name}" for name in over])
    return {one.name.rpartition("-")[0] for one in listed if one.name not in over}


def _leased_by_files(directory: Path) -> Set[str]:
    """The generations that a living reader of an earlier version has leased, by the files in `directory`; removes those
    of dead readers. A file that may not be opened counts as a living reader's."""
    found = set()
    for file in sorted(directory.iterdir()) if directory.is_dir() else ():
        if file.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):
            try:
                fd = _opened(file)
            except PermissionError:
                found.add(file.name.rpartition("-")[0])
                continue
            try:
                if _is_locked(fd):
                    found.add(file.name.rpartition("-")[0])
                else:
                    with contextlib.suppress(PermissionError):
                        file.unlink()
            finally:
                os.close(fd)
    return found


def _listed(path: Where) -> list[str]:
    """The names below `generations/`; none where it is not there. Raises OSError."""
    return storing.names(path / "generations")
