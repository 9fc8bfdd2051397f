"""Who writes to a state: an flock on `lock`, which holds the writer's pid and URL."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple

from continual.errors import Busy, Misconfigured
from continual.state.durable import environment
from continual.state.framing import encode

_FOR_GOOD = (errno.EACCES, errno.EPERM, errno.EROFS)


def take(path: Path) -> int:
    """Locks `path` for writing; returns the descriptor that holds the lock. Raises Busy with pid and URL of who has it,
    Misconfigured if read-only, Retry where the disk gets in the way."""
    with environment(f"cannot lock {path.parent}"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in _FOR_GOOD:
                raise
            raise Misconfigured(
                f"{path}: cannot open the state for writing ({error.strerror}); "
                "use a writable state, or a command that only reads"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise _busy(path) from None
        except OSError:
            os.close(fd)
            raise
    tell(fd, None)
    return fd


def _busy(path: Path) -> Busy:
    pid, url = holder(path)
    who = f"process {pid}" if pid is not None else "another process"
    where = f" at {url}" if url else ""
    hint = (
        "stop it first (systemctl stop continual, or kill the process), or publish models into its watched folder"
        if url
        else "wait until it is done"
    )
    return Busy(f"{path.parent} is being written by {who}{where}; {hint}", pid, url)


def tell(fd: int, url: str | None) -> None:
    """Writes into the lock file that this process holds it, and where its daemon answers. It only informs: where the
    disk is full the file stays empty, and the lock is held all the same."""
    data, _ = encode({"pid": os.getpid(), "url": url})
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)


class Holder(NamedTuple):
    """What the lock file says of the process that holds it: its pid, and where its daemon answers."""

    pid: int | None = None
    url: str | None = None


def holder(path: Path) -> Holder:
    """What the lock file at `path` says of its holder; nothing if it is half written. It does not say whether that
    process still runs."""
    try:
        _, _, text = path.read_bytes().partition(b"\n")
        body = json.loads(text)
    except (OSError, ValueError):
        return Holder()
    if not isinstance(body, dict):
        return Holder()
    pid, url = body.get("pid"), body.get("url")
    return Holder(pid if isinstance(pid, int) else None, url if isinstance(url, str) else None)
