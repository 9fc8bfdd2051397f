"""What the kernel says of changes in directories (inotify, by the package watchdog). It only makes looking quick:
whoever asks for it looks from time to time by itself, because nothing is told on network file systems, beyond a limit
of watches, or after too many changes at once.

Each directory is watched by itself through watchdog's `InotifyFD`: its `Observer` would watch all that lies below as
deep as it goes, and tell neither that notices were lost nor that a directory is not watched (decision 0029).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from watchdog.observers.inotify_c import CallbackId, InotifyEvent, Mask, WatchDescriptor

_HELD = 100_000
"""Changes that are kept until somebody asks; of more, it is said that notices were lost."""


class Told(NamedTuple):
    """What changed since the last time: `changed` has directories in which something did, and such as came or went.
    `lost`: more happened than could be told."""

    changed: frozenset[str]
    lost: bool = False


class Notices:
    """The directories that the kernel tells of. `unwatched`: those that it would not take, because of its limits.

    watchdog hears of changes on a thread of its own; `wake` is called on it.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        """Raises OSError where the kernel gives no notices, or no more of them."""
        try:
            from watchdog.observers import inotify_c
        except (ImportError, AttributeError) as error:
            raise OSError(errno.ENOSYS, "this system has no inotify") from error
        self._constants = inotify_c.InotifyConstants
        self._inotify = inotify_c.InotifyFD()
        self._me: CallbackId = inotify_c.CallbackId(0)  # the only callback of each watch
        self.unwatched: set[str] = set()
        self._wake = wake
        self._lock = threading.Lock()
        self._path: dict[WatchDescriptor, str] = {}
        self._watch: dict[str, WatchDescriptor] = {}
        self._changes: set[str] = set()
        self._lost = False
        self._inotify.start()

    def close(self) -> None:
        """Ends all of it."""
        self._inotify.stop()
        self._inotify.join()

    def add(self, path: str, *, follow: bool = False) -> None:
        """Has the kernel tell of the directory `path`, if it does not do so yet. `follow`: also through a link."""
        with self._lock:
            if path in self._watch:
                return
        try:
            watch = self._inotify.add_callback(os.fsencode(path), self._mask(follow=follow), self, self._me)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                self.unwatched.add(path)
            return  # it is gone, or may not be read: looking says so
        self.unwatched.discard(path)
        with self._lock:
            self._path[watch] = path
            self._watch[path] = watch

    def remove(self, path: str) -> None:
        """Has the kernel tell no more of the directory `path`."""
        self.unwatched.discard(path)
        with self._lock:
            watch = self._watch.pop(path, None)
            if watch is None or self._path.get(watch) != path:
                return
            del self._path[watch]
        self._inotify.remove_callbacks([(watch, self._me)])

    def change(self, path: str, before: Iterable[str], after: Iterable[str]) -> None:
        """Has the kernel tell of other folders in the directory `path` than before."""
        for name in set(before).difference(after):
            self.remove(f"{path}/{name}")
        for name in after:
            self.add(f"{path}/{name}")

    def take(self) -> Told:
        """What was told since the last time."""
        with self._lock:
            changed, self._changes = self._changes, set()
            lost, self._lost = self._lost, False
        return Told(frozenset(changed), lost)

    def on_event(self, event: InotifyEvent) -> None:
        """Hears of a change; called by watchdog."""
        with self._lock:
            path = self._path.get(event.wd)
            if path is None:
                return
            inside = event.mask & self._constants.IN_ISDIR and event.name
            self._changes.add(os.path.join(path, os.fsdecode(event.name)) if inside else path)
            if len(self._changes) > _HELD:
                self._changes.clear()
                self._lost = True
        if event.mask & self._constants.IN_MOVE_SELF:  # the watch is not on this path any more
            self.remove(path)
        self._wake()

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """Hears that the kernel has dropped a watch, as its directory is gone; called by watchdog."""
        with self._lock:
            path = self._path.pop(wd, None)
            if path is not None and self._watch.get(path) == wd:
                del self._watch[path]

    def on_queue_overflow(self) -> None:
        """Hears that the kernel dropped notices; called by watchdog."""
        with self._lock:
            self._lost = True
        self._wake()

    def _mask(self, *, follow: bool) -> Mask:
        """The events that are asked for: nothing of what reading does, neither opening nor closing what was only
        read."""
        of = self._constants
        asked = of.IN_CLOSE_WRITE | of.IN_MOVE | of.IN_CREATE | of.IN_DELETE | of.IN_DELETE_SELF | of.IN_MOVE_SELF
        return cast("Mask", asked | of.IN_ONLYDIR | of.IN_EXCL_UNLINK | (0 if follow else of.IN_DONT_FOLLOW))
