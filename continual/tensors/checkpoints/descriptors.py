"""The file descriptors of all models that are open, within one bound for the process: a model may have a thousand
shards, and rounds open dozens of models.

A file is closed behind the back of whoever reads it when others need the room, and opened again when it is read next.
Then it has to be the same file, unchanged; so nobody notices but the kernel.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from continual.errors import Refuse, Retry
from continual.outside import open_regular
from continual.records import FileStat

_SHARE = 8
"""The part of the descriptors allowed to the process (`ulimit -n`) that models may take: one of so many."""
_FEWEST, _MOST = 8, 128


class Identity(NamedTuple):
    """What tells a file from every other, and from itself before a change. `ctime_ns`: of a file that others can write
    to, who may set its other times back; 0 of one of our own, to which a link may be made meanwhile."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int = 0

    @staticmethod
    def of(found: os.stat_result, *, of_others: bool = False) -> Identity:
        """That of a file as `stat` found it."""
        ctime = found.st_ctime_ns if of_others else 0
        return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, ctime)


class ModelFile:
    """A file of a model. `identity` says what it was when it was opened first. Used by Descriptors alone, under its
    lock; `opening` keeps all but one thread away while that one opens it."""

    def __init__(self, path: Path, root: Path | None) -> None:
        self.path = path
        self.root = root
        self.identity: Identity | None = None
        self.fd = -1
        self.readers = 0
        self.opening = False
        self.done = False

    @property
    def stat(self) -> FileStat:
        """What the file was when it was opened first."""
        assert self.identity is not None
        return FileStat(self.path.name, self.identity.size, self.identity.mtime_ns, self.identity.inode)

    def open(self) -> None:
        """Opens the file. Raises OSError, Refuse (`outside`), and Retry if it is not what it was."""
        fd = open_regular(self.path)
        try:
            identity = Identity.of(os.fstat(fd), of_others=self.root is not None)
            if self.identity is None:
                _check_inside(fd, self.path, self.root)
            elif identity != self.identity:
                raise Retry(changed(self.path))
        except BaseException:
            os.close(fd)
            raise
        self.identity, self.fd = identity, fd

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Descriptors:
    """At most `most` open files, the ones that were read last. Thread-safe."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: OrderedDict[ModelFile, None] = OrderedDict()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def reading(self, file: ModelFile) -> Iterator[int]:
        """The descriptor of a file, which stays open within the block. Waits while all others are being read.

        Raises OSError, Refuse and Retry where the file has to be opened and cannot be.
        """
        with self._changed:
            while file.opening or (file.fd < 0 and not self._room()):
                self._changed.wait()
            file.opening = file.fd < 0
            self._open[file] = None
            self._open.move_to_end(file)
            file.readers += 1
        try:
            if file.opening:
                self._make(file)
            yield file.fd
        finally:
            with self._changed:
                file.readers -= 1
                if (file.done or file.fd < 0) and not file.readers:
                    self._drop(file)
                self._changed.notify_all()

    def close(self, file: ModelFile) -> None:
        """Closes a file for good, as soon as nobody reads it."""
        with self._changed:
            file.done = True
            if not file.readers:
                self._drop(file)
            self._changed.notify_all()

    def _make(self, file: ModelFile) -> None:
        """Opens a file for which there is room, without the lock: a file system that hangs holds up nobody else."""
        try:
            self._opened(file)
        finally:
            with self._changed:
                file.opening = False
                self._changed.notify_all()

    def _opened(self, file: ModelFile) -> None:
        try:
            file.open()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # others took what the process may have: give back all that is idle here, and try once more
            with self._changed:
                for idle in [file for file in self._open if not file.readers]:
                    self._drop(idle)
            file.open()

    def _room(self) -> bool:
        """Whether one more file can be opened; closes the one that was not read for longest if it has to."""
        if len(self._open) < self.most:
            return True
        idle = next((file for file in self._open if not file.readers), None)
        if idle is None:
            return False
        self._drop(idle)
        return True

    def _drop(self, file: ModelFile) -> None:
        self._open.pop(file, None)
        file.close()


def changed(path: Path) -> str:
    """The message about a file that is not what it was."""
    return f"{path}: changed while it was read; nothing was settled, it is taken up again when it is still"


def _check_inside(fd: int, path: Path, root: Path | None) -> None:
    """Raises Refuse if an open file lies outside `root`. The kernel is asked, so that no link can be exchanged in
    between."""
    if root is None:
        return
    target = Path(os.readlink(f"/proc/self/fd/{fd}"))
    if not target.is_relative_to(root.resolve()):
        raise Refuse("outside", f"{path} leads out of the watched folder, to {target}: publish the file itself")


def _allowed() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, soft // _SHARE))


SHARED = Descriptors(_allowed())
"""Those of this process."""
