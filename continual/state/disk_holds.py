"""Who holds what of a state on a disk: an flock for its writer on `lock`, which holds the writer's pid and URL, and one
for each reader on the receipts of what it reads. The kernel gives them back, however a process ends. holding.py says
what each is for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

from continual.errors import Misconfigured
from continual.state import storing
from continual.state.durable import move_away
from continual.state.framing import encode
from continual.state.names import EXPIRED, RECEIPTS

_LOOKS = 100
"""How often a lock is tried that nobody has for writing."""
_LOOKED = 0.01
"""Seconds in which who looked at it has ended."""


class Flock:
    """The lock for writing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.tell(None)

    def tell(self, url: str | None) -> None:
        """It only informs: where the disk is full the file stays empty, and the lock is held all the same."""
        data, _ = encode({"pid": os.getpid(), "host": socket.gethostname(), "url": url})
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)

    def must_hold(self) -> None:
        """Nobody can take it."""

    def close(self) -> None:
        """Gives it back."""
        os.close(self._fd)


class DiskHolds:
    """Of a state on any disk of this machine."""

    def lock(self, path: Path) -> Flock:
        file = path / "lock"
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except IsADirectoryError:
            raise Misconfigured(
                f"{file} is a directory, as of a state on an object store that was copied file by file: delete it, and "
                "copy with 'continual backup' the next time"
            ) from None
        try:
            _lock(fd)
        except OSError:
            os.close(fd)
            raise
        return Flock(fd)

    def said(self, path: Path) -> bytes:
        return (path / "lock").read_bytes()

    def is_locked(self, path: Path) -> bool:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # it is taken, or the file system has no locks
            return True
        finally:
            os.close(fd)
        return False

    @contextlib.contextmanager
    def lease(self, path: Path, generation: str) -> Iterator[None]:
        """It needs no permission to write."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path / "generations" / generation / RECEIPTS, os.O_RDONLY | os.O_CLOEXEC)
                held.callback(os.close, fd)
                with contextlib.suppress(OSError):  # a file system without locks: nobody can lease there
                    fcntl.flock(fd, fcntl.LOCK_SH)
            yield

    def leased(self, path: Path, names: Sequence[str]) -> set[str]:
        return _leased_by_files(path / "leases") | {n for n in names if _is_leased(path / "generations" / n)}

    def stands(self, generation: Path) -> bool:
        return generation.exists()

    def mark(self, path: Path, name: str, may: Callable[[], None]) -> bool:
        """A mark is another name. A kill while its files are deleted leaves no half of a generation under a name that a
        record knows."""
        generation = path / "generations" / name
        may()
        with _unless_leased(generation) as free:
            if free:
                move_away(generation, generation.with_name(f"{EXPIRED}{name}"))
        return free

    def delete(self, path: Path, name: str, _needed: Container[str]) -> None:
        storing.remove_tree(path / "generations" / name)

    def unwritten(self, _path: Path, names: Sequence[str]) -> Sequence[str]:
        return names  # who wrote them has ended


def _lock(fd: int) -> None:
    """Locks an open file for writing. Who looks whether it is locked has a lock that others may have too, for a moment.
    Raises BlockingIOError where another writer has it."""
    for left in reversed(range(_LOOKS)):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        time.sleep(_LOOKED)


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


def _leased_by_files(directory: Path) -> set[str]:
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
