"""What the kernel says of changes in directories (inotify). It only makes looking quick: whoever asks for it looks from
time to time by itself, because nothing is told on network file systems, beyond a limit of watches, or after too many
changes at once.

The package watchdog was used before. It said neither that notices were lost nor that a directory is not watched, and
walked the folders once more (decision 0029).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections import deque
from typing import NamedTuple

_CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_OVERFLOW, _IGNORED, _ISDIR = 0x4000, 0x8000, 0x40000000
_ONLYDIR, _DONT_FOLLOW, _EXCL_UNLINK = 0x01000000, 0x02000000, 0x04000000
_ASKED = _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
"""Nothing of what reading does is asked for: neither opening nor closing what was only read."""
_HEAD = struct.Struct("iIII")
_CHUNK = 1 << 16
_HELD = 64
"""Chunks that are kept until somebody asks; of more, it is said that notices were lost."""


class Told(NamedTuple):
    """What changed since the last time: `changed` has directories in which something did, and such as came or went.
    `lost`: more happened than could be told."""

    changed: frozenset[str]
    lost: bool = False


class Notices:
    """The directories that the kernel tells of. `unwatched`: how many it would not take, because of its limits."""

    def __init__(self) -> None:
        """Raises OSError where the kernel gives no notices, or no more of them."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "inotify_init1"):
            raise OSError(errno.ENOSYS, "this system has no inotify")
        self.fd = self._called(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self.unwatched: set[str] = set()
        self._path: dict[int, str] = {}
        self._watch: dict[str, int] = {}
        self._chunks: deque[bytes] = deque()
        self._lost = False

    def close(self) -> None:
        """Ends all of it."""
        os.close(self.fd)

    def add(self, path: str, *, follow: bool = False) -> None:
        """Has the kernel tell of the directory `path`, if it does not do so yet. `follow`: also through a link."""
        if path in self._watch:
            return
        mask = _ASKED | _ONLYDIR | _EXCL_UNLINK | (0 if follow else _DONT_FOLLOW)
        try:
            watch = self._called(self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                self.unwatched.add(path)
            return  # it is gone, or may not be read: looking says so
        self.unwatched.discard(path)
        self._path[watch] = path
        self._watch[path] = watch

    def remove(self, path: str) -> None:
        """Has the kernel tell no more of the directory `path`."""
        self.unwatched.discard(path)
        watch = self._watch.pop(path, None)
        if watch is not None and self._path.get(watch) == path:
            del self._path[watch]
            with contextlib.suppress(OSError):  # the kernel has dropped it already
                self._called(self._libc.inotify_rm_watch(self.fd, watch))

    def fetch(self) -> None:
        """Takes what the kernel has ready. Never waits; for the thread that hears of it, while another may be
        looking."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, _CHUNK):
                if len(self._chunks) < _HELD:
                    self._chunks.append(data)
                else:
                    self._lost = True

    def take(self) -> Told:
        """What was told since the last time."""
        changed = set[str]()
        lost, self._lost = self._lost, False
        while self._chunks:
            data = self._chunks.popleft()
            at = 0
            while at < len(data):
                watch, mask, _, length = _HEAD.unpack_from(data, at)
                name = data[at + _HEAD.size : at + _HEAD.size + length].rstrip(b"\0")
                at += _HEAD.size + length
                lost |= bool(mask & _OVERFLOW)
                if (path := self._path.get(watch)) is not None:
                    changed.add(self._changed(path, mask, os.fsdecode(name)))
        return Told(frozenset(changed), lost)

    def _changed(self, path: str, mask: int, name: str) -> str:
        if mask & (_IGNORED | _MOVE_SELF):  # the watch is not on this path any more
            self.remove(path)
        return os.path.join(path, name) if mask & _ISDIR and name else path

    @staticmethod
    def _called(answer: int) -> int:
        if answer < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return answer
