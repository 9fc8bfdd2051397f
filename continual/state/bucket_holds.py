"""Who holds what of a state on an object store. The writer: the newest of the objects below `lock/`, whose numbers only
grow; it is created by one of those who race for it, and written again as long as its writer lives. A reader: an object
below `leases/` that it writes again. holding.py says what each is for, heartbeat.py how clocks are used."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import datetime

from continual.errors import Halt, Retry
from continual.state import framing, heartbeat, storing
from continual.state.durable import trouble
from continual.state.names import EXPIRED, RECEIPTS
from continual.stores import ObjectPath

_LOOKS = 0.5
"""Seconds between looks at a lease that may be a dead writer's."""
_LEASES = 3
_LEAST = 180.0
"""Leases, and seconds at the least, after which nothing comes of what was sent before they began: who may have been
waiting for an answer has given up by then, however short its lease was."""
_LONGEST = 3600.0
"""Seconds of a lease at the most."""
_log = logging.getLogger("continual.state")


class WriterLease:
    """The lock on an object store, `number` of those below `lock/`, which was created `since` then."""

    def __init__(self, path: ObjectPath, number: int, token: str, since: float) -> None:
        self._path, self._number, self._token = path, number, token
        self._url: str | None = None
        self._count = itertools.count(1)
        self._beat = heartbeat.Heartbeat(_file(path, number), self._body, self._is_taken, since)

    def tell(self, url: str | None) -> None:
        """It only informs."""
        self._url = url
        with contextlib.suppress(OSError):
            self._beat.beat()

    def must_hold(self) -> None:
        """Raises Halt where the lease ran out, or somebody has taken it: another process may write by now."""
        least = self._path.objects.lease / 3  # what is asked for now is answered, or given up, before it is over
        if self._beat.left() < least:
            with contextlib.suppress(OSError):
                self._beat.beat()
        if self._beat.left() < least:
            why = f"the store did not answer for {self._path.objects.lease:.0f} s, or this process was stopped"
            if self._beat.trouble is not None:
                why = trouble(self._beat.trouble)
            raise Halt(
                f"{self._path.parent}: the lease of this writer ran out, and another process may write by now: {why}; "
                "nothing was settled; start again"
            )

    def close(self) -> None:
        """Gives it back: the next writer needs not wait."""
        self._beat.end()
        if self._beat.left() > 0:
            with contextlib.suppress(OSError):
                self._path.objects.put_now(_file(self._path, self._number).key, self._body(released=True))

    def _body(self, released: bool = False) -> bytes:
        return _lease(self._token, self._url, next(self._count), self._path.objects.lease, released)

    def _is_taken(self) -> bool:
        return max(_numbers(self._path), default=0) > self._number


def _lease(token: str, url: str | None, beat: int, seconds: float, released: bool = False) -> bytes:
    told = {"pid": os.getpid(), "host": socket.gethostname(), "url": url, "token": token}
    return framing.encode({**told, "beat": beat, "seconds": seconds, "released": released})[0]


def _taken(path: ObjectPath) -> WriterLease:
    """Creates the next object below `lock/`, once the newest is given back or has run out. Raises BlockingIOError."""
    if path.is_file():  # that of a state on a disk, which was copied here
        path.unlink()
    now = heartbeat.now(path.parent)
    newest = max(_numbers(path), default=0)
    if newest:
        try:
            _over(path, newest, now)
        except FileNotFoundError:  # who took the next one has deleted it
            raise BlockingIOError from None
    number, token, since = newest + 1, secrets.token_hex(8), heartbeat.boottime()
    try:
        with storing.creating(_file(path, number), _lease(token, None, 0, path.objects.lease), _silent) as new:
            new.make()
    except Retry:  # of those who waited for it another was first
        raise BlockingIOError from None
    held = WriterLease(path, number, token, since)
    try:
        _clear(path, number, now)
    except BaseException:
        held.close()
        raise
    return held


def _clear(path: ObjectPath, number: int, now: datetime) -> None:
    """Deletes the leases before this one, and what killed processes left of asking for the time."""
    older = [_file(path, n).key for n in _numbers(path) if n < number]
    for one in path.objects.below(path.key):
        if one.name.startswith(heartbeat.PROBE) and heartbeat.ran_out(one.modified, now, path.objects.lease):
            older.append(f"{path.key}/{one.name}")
    path.objects.delete(older)


def _over(path: ObjectPath, number: int, now: datetime) -> None:
    """Waits until nobody can hold the lease any more, and says so in the log. Raises BlockingIOError where its
    holder is heard of."""
    file = _file(path, number)
    first = file.read_bytes()
    told = framing.said(first)
    lease = _seconds(told, path)
    if told.get("released") is True or heartbeat.ran_out(file.objects.head(file.key).modified, now, lease):
        return
    _log.warning(
        "%s: process %r on %r has it open for writing, or was killed: this waits for a sign of life, or for its lease "
        "to run out, %.0f s at the most",
        path.parent,
        told.get("pid"),
        told.get("host"),
        lease,
    )
    until = heartbeat.boottime() + lease
    while heartbeat.boottime() < until:
        time.sleep(min(_LOOKS, lease / heartbeat.BEATS))
        found = file.read_bytes()
        if framing.said(found).get("released") is True:
            return
        if found != first:
            raise BlockingIOError


def heard(path: ObjectPath) -> tuple[datetime, float]:
    """When the last writer of the state in `path` was heard of, by the clock of the store, and for how many seconds it
    has the state from then on. Raises OSError."""
    file = _file(path / "lock", max(_numbers(path / "lock"), default=0))
    return file.objects.head(file.key).modified, _seconds(framing.said(file.read_bytes()), path)


def _seconds(told: Mapping[str, object], path: ObjectPath) -> float:
    """How long the lease is that says this; where it says nothing that can be, as long as those of this process."""
    seconds = told.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 < seconds <= _LONGEST else path.objects.lease


def _ran_out(lease: ObjectPath, written: datetime, now: datetime) -> bool:
    """Whether a reader's lease is over that was last written then."""
    if not heartbeat.ran_out(written, now, 0.0):
        return False
    try:
        return heartbeat.ran_out(written, now, _seconds(framing.said(lease.read_bytes()), lease))
    except FileNotFoundError:  # its reader has just ended
        return True


def _numbers(path: ObjectPath) -> list[int]:
    return [int(name[:-5]) for name in storing.names(path) if name.endswith(".json") and name[:-5].isdecimal()]


def _file(path: ObjectPath, number: int) -> ObjectPath:
    return path / f"{number:08d}.json"


class BucketHolds:
    """Of a state in any bucket of any store."""

    def lock(self, path: ObjectPath) -> WriterLease:
        """This waits for a writer that is not heard of, until its lease has run out."""
        return _taken(path / "lock")

    def said(self, path: ObjectPath) -> bytes:
        return _file(path / "lock", max(_numbers(path / "lock"), default=0)).read_bytes()

    def is_locked(self, path: ObjectPath) -> bool:
        """A killed writer has it until the next one takes it."""
        return bool(_numbers(path / "lock"))

    @contextlib.contextmanager
    def lease(self, path: ObjectPath, generation: str) -> Iterator[None]:
        """Whoever may not write there reads without."""
        at, since = path / "leases" / f"{generation}-{secrets.token_hex(4)}", heartbeat.boottime()
        body = framing.encode({"seconds": path.objects.lease})[0]
        try:
            at.objects.put_now(at.key, body)
        except PermissionError:
            yield
            return
        beat = heartbeat.Heartbeat(at, lambda: body, lambda: False, since)
        try:
            yield
        finally:
            beat.end()
            with contextlib.suppress(OSError):
                at.unlink()

    def leased(self, path: ObjectPath, _names: Sequence[str]) -> set[str]:
        """Leases that have run out are deleted, each after its own seconds: a reader may have another setting."""
        listed = list(path.objects.below(f"{path.key}/leases"))
        try:
            now = heartbeat.now(path) if listed else None
        except PermissionError:  # who may only read looks at what would go
            now = None
        over = [one.name for one in listed if now and _ran_out(path / "leases" / one.name, one.modified, now)]
        path.objects.delete([f"{path.key}/leases/{name}" for name in over])
        return {one.name.rpartition("-")[0] for one in listed if one.name not in over}

    def stands(self, generation: ObjectPath) -> bool:
        if _mark(generation).is_file():
            return False
        return (generation / RECEIPTS).is_file() or generation.is_dir()

    def mark(self, path: ObjectPath, name: str, may: Callable[[], None]) -> bool:
        """A mark is an object. Readers lease first and look for it then; so it is made first, and leases are looked at
        then: of the two at least one sees the other. So with a writer that has gone back to the generation since this
        one was stopped."""
        mark = _mark(path / "generations" / name)
        may()
        storing.replace(mark, b"")
        try:
            may()
            if name not in self.leased(path, [name]):
                return True
        except Halt:
            storing.remove(mark)
            raise
        storing.remove(mark)
        return False

    def delete(self, path: ObjectPath, name: str, needed: Container[str]) -> None:
        """The mark goes last. It may be of a process that died before it looked at leases, or that had been stopped
        until what it marked was in force again."""
        marked = name.removeprefix(EXPIRED)
        if marked != name and marked not in needed:
            if marked in self.leased(path, [marked]):
                return
            storing.remove_tree(path / "generations" / marked)
        storing.remove_tree(path / "generations" / name)

    def unwritten(self, path: ObjectPath, names: Sequence[str]) -> Sequence[str]:
        """A writer that lost its lease may still write what was written a short time ago."""
        if not names:
            return names
        now, long = heartbeat.now(path), max(_LEASES * path.objects.lease, _LEAST)

        def is_old(name: str) -> bool:
            written = max((one.modified for one in path.objects.below(f"{path.key}/generations/{name}")), default=None)
            return written is None or heartbeat.ran_out(written, now, long)

        return [name for name in names if name.startswith(EXPIRED) or is_old(name)]


def _mark(generation: ObjectPath) -> ObjectPath:
    return generation.with_name(f"{EXPIRED}{generation.name}") / RECEIPTS


def _silent(_step: str) -> None:
    pass
