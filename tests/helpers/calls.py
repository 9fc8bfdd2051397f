"""Every call by which this process asks the kernel for something below a directory: counted, and at a chosen one the
process ends, or the call fails.

The functions of `os` that take a path or a descriptor are wrapped while the block lasts, and `open` is Python's own
implementation of it in Python, which writes by `os.write`. What `shutil`, `pathlib` and `tempfile` do goes through
these too. No function of ours is replaced.
"""

from __future__ import annotations

import _pyio
import builtins
import contextlib
import errno
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

KILLED = 137
"""How a process ends that is killed at a call."""
WRITES = ("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range")
NAMES = ("mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove")
LOOKS = ("stat", "lstat", "scandir", "listdir", "readlink", "statvfs")
READS = ("read", "pread", "preadv", "readv")
CHANGES = ("open", *WRITES, *NAMES, "truncate", "ftruncate", "fsync", "fdatasync")
"""Calls after which something on the disk is another (`open` where it is to write)."""
_SECOND = ("rename", "replace", "link", "symlink")
_BY_PATH = ("open", "open to read", *NAMES, *LOOKS, "truncate")
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FAILS = {
    errno.EIO: (*CHANGES, *LOOKS, *READS, "open to read", "flock"),
    errno.ENOSPC: ("open", *WRITES, "mkdir", "link", "symlink", "rename", "replace"),
    errno.EROFS: ("open", *NAMES, "truncate"),
    errno.EACCES: _BY_PATH,
    errno.EMFILE: ("open", "open to read", "scandir", "listdir"),
    errno.ENAMETOOLONG: _BY_PATH,
}
"""Which calls can fail so."""


class Called(NamedTuple):
    """A call below the directory: what it is, its first path, and the call itself."""

    what: str
    path: str
    do: Callable[[], Any]


Act = Callable[[Called], Any]
"""What is done in place of a call."""


@contextlib.contextmanager
def watched(root: Path, act: Act) -> Iterator[None]:
    """Has `act` do every call that this process makes below `root`, in any thread, and nothing else do."""
    inside = threading.local()
    places = tuple(os.path.realpath(root) + tail for tail in ("", os.sep))

    def wrap(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if getattr(inside, "now", False):
                return real(*args, **more)
            inside.now = True
            try:
                path = _path_of(what, args, more)
                if path != places[0] and not path.startswith(places[1]):
                    return real(*args, **more)
                if what == "open" and not (args[1] if len(args) > 1 else more.get("flags", 0)) & _TO_WRITE:
                    return act(Called("open to read", path, lambda: real(*args, **more)))
                return act(Called(what, path, lambda: real(*args, **more)))
            finally:
                inside.now = False

        return wrapped

    kept = {(os, name): getattr(os, name) for name in (*CHANGES, *LOOKS, *READS)}
    kept |= {(fcntl, "flock"): fcntl.flock}
    opens = {(builtins, "open"): builtins.open, (io, "open"): io.open}
    for (module, name), real in kept.items():
        setattr(module, name, wrap(name, real))
    for module, name in opens:
        setattr(module, name, _pyio.open)
    try:
        yield
    finally:
        for (module, name), real in (kept | opens).items():
            setattr(module, name, real)


def _path_of(what: str, args: tuple[Any, ...], more: dict[str, Any]) -> str:
    """The path that a call is about, or of which the descriptor is."""
    given = args[1] if what in _SECOND and len(args) > 1 else args[0] if args else "."
    if isinstance(given, int):
        try:
            return os.readlink(f"/proc/self/fd/{given}")
        except OSError:
            return ""
    path = os.fsdecode(given)
    directory = more.get("dst_dir_fd", more.get("dir_fd"))
    if not os.path.isabs(path) and directory is not None:
        path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    return os.path.abspath(path)


class Counter:
    """Counts the calls that `counts` says, from 1, and does `then` in place of number `at` (None: of none); with
    `lasting` of every later one as well. Calls of several threads are counted one after the other."""

    def __init__(self, counts: Callable[[str], bool], at: int | None, then: Act, *, lasting: bool = False) -> None:
        self.count = 0
        self.seen: list[str] = []
        self.at = at
        self._counts, self._then, self._lasting = counts, then, lasting
        self._lock = threading.Lock()

    def __call__(self, called: Called) -> Any:
        if not self._counts(called.what):
            return called.do()
        with self._lock:
            self.count += 1
            number = self.count
            self.seen.append(f"{called.what} {called.path}")
        if self.at is not None and (number == self.at or (self._lasting and number > self.at)):
            return self._then(called)
        return called.do()


def changes(what: str) -> bool:
    """Whether a kill before this call leaves something else than a kill before the next one."""
    return what in CHANGES


def kill(_called: Called) -> Any:
    """Ends the process as SIGKILL does: nothing is cleaned up, every lock is free."""
    os._exit(KILLED)


def fail(number: int) -> Act:
    """Has the call fail with this `errno`."""

    def failed(called: Called) -> Any:
        raise OSError(number, os.strerror(number), called.path)

    return failed


def fail_after(number: int) -> Act:
    """Does the call, and says that it failed."""

    def failed(called: Called) -> Any:
        called.do()
        raise OSError(number, os.strerror(number), called.path)

    return failed
