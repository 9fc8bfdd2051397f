"""Who writes to a state. On a disk an flock on `lock`, which holds the writer's pid and URL. On an object store the
newest of the objects below `lock/`, whose numbers only grow: it is created by one of those who race for it, and written
again as long as its writer lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import secrets
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from continual.errors import Busy, Halt, Misconfigured, Retry
from continual.state import heartbeat, storing
from continual.state.durable import environment, trouble
from continual.state.framing import encode
from continual.stores import ObjectPath, Where

_FOR_GOOD = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOOKS = 0.5
"""Seconds between looks at a lease that may be a dead writer's."""


class Lock(Protocol):
    """A lock that is held."""

    def tell(self, url: str | None) -> None:
        """Says that this process holds it, and where its daemon answers."""

    def must_hold(self) -> None:
        """Raises Halt where it is not held any more: then nothing may be committed."""

    def close(self) -> None:
        """Gives it back."""


def take(path: Where) -> Lock:
    """Locks `path`, the lock of a state, for writing. Raises Busy with pid and URL of who has it, Misconfigured if
    read-only, Retry where the disk or the store gets in the way.

    On an object store this waits for a writer that is not heard of, until its lease has run out."""
    with environment(f"cannot lock {path.parent}"):
        try:
            return _taken(path) if isinstance(path, ObjectPath) else _locked(path)
        except PermissionError as error:
            raise _read_only(path, error) from None


def _read_only(path: Where, error: OSError) -> Misconfigured:
    return Misconfigured(
        f"{path}: cannot open the state for writing ({error.strerror}); "
        "use a writable state, or a command that only reads"
    )


def _locked(path: Path) -> Flock:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except IsADirectoryError:
        raise Misconfigured(
            f"{path} is a directory, as of a state on an object store that was copied file by file: delete it, and "
            "copy with 'continual backup' the next time"
        ) from None
    except OSError as error:
        if error.errno not in _FOR_GOOD:
            raise
        raise _read_only(path, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise _busy(path) from None
    except OSError:
        os.close(fd)
        raise
    return Flock(fd)


class Flock:
    """The lock on a disk: the kernel gives it back when the process ends, however it does."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.tell(None)

    def tell(self, url: str | None) -> None:
        """It only informs: where the disk is full the file stays empty, and the lock is held all the same."""
        data, _ = encode({"pid": os.getpid(), "url": url})
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)

    def must_hold(self) -> None:
        """Nobody can take it."""

    def close(self) -> None:
        """Gives it back."""
        os.close(self._fd)


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
    return encode({**told, "beat": beat, "seconds": seconds, "released": released})[0]


def _taken(path: ObjectPath) -> WriterLease:
    """Creates the next object below `lock/`, once the newest is given back or has run out."""
    if path.is_file():  # that of a state on a disk, which was copied here
        path.unlink()
    now = heartbeat.now(path.parent)
    newest = max(_numbers(path), default=0)
    if newest:
        try:
            _over(path, newest, now)
        except FileNotFoundError:  # who took the next one has deleted it
            raise _busy(path) from None
    number, token, since = newest + 1, secrets.token_hex(8), heartbeat.boottime()
    try:
        with storing.creating(_file(path, number), _lease(token, None, 0, path.objects.lease), _silent) as new:
            new.make()
    except Retry:  # of those who waited for it another was first
        raise _busy(path) from None
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
    """Waits until nobody can hold the lease any more. Raises Busy where its holder is heard of."""
    file = _file(path, number)
    first = file.read_bytes()
    told = _said(first)
    seconds = told.get("seconds")
    lease = float(seconds) if isinstance(seconds, int | float) else path.objects.lease
    if told.get("released") is True or heartbeat.ran_out(file.objects.head(file.key).modified, now, lease):
        return
    until = heartbeat.boottime() + lease
    while heartbeat.boottime() < until:
        time.sleep(min(_LOOKS, lease / heartbeat.BEATS))
        found = file.read_bytes()
        if _said(found).get("released") is True:
            return
        if found != first:
            raise _busy(path)


def _numbers(path: ObjectPath) -> list[int]:
    return [int(name[:-5]) for name in storing.names(path) if name.endswith(".json") and name[:-5].isdecimal()]


def _file(path: ObjectPath, number: int) -> ObjectPath:
    return path / f"{number:08d}.json"


def _busy(path: Where) -> Busy:
    pid, url, host = holder(path)
    who = f"process {pid}{f' on {host}' if host else ''}" if pid is not None else "another process"
    where = f" at {url}" if url else ""
    hint = (
        "stop it first (systemctl stop continual, or kill the process), or publish models into its watched folder"
        if url
        else "wait until it is done"
    )
    return Busy(f"{path.parent} is being written by {who}{where}; {hint}", pid, url)


class Holder(NamedTuple):
    """What the lock says of the process that holds it: its pid, where its daemon answers, and, on an object store, the
    name of its machine."""

    pid: int | None = None
    url: str | None = None
    host: str | None = None


def holder(path: Where) -> Holder:
    """What the lock at `path` says of its holder; nothing if it is half written, or was given back. It does not say
    whether that process still runs."""
    try:
        if isinstance(path, ObjectPath):
            path = _file(path, max(_numbers(path), default=0))
        body = _said(path.read_bytes())
    except OSError:
        return Holder()
    if body.get("released") is True:
        return Holder()
    pid, url, host = body.get("pid"), body.get("url"), body.get("host")
    return Holder(
        pid if isinstance(pid, int) else None,
        url if isinstance(url, str) else None,
        host if isinstance(host, str) else None,
    )


def _said(data: bytes) -> dict[str, object]:
    """What a lock says; nothing if it is half written."""
    try:
        body = json.loads(data.partition(b"\n")[2])
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _silent(_step: str) -> None:
    pass
