"""Who writes to a state: an flock on `lock`, which holds the writer's pid and URL; and leases of readers on
generations."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from continual.errors import Busy, Misconfigured
from continual.state.framing import encode


def take(path: Path) -> int:
    """Locks `path` for writing; returns the descriptor that holds the lock. Raises Busy with pid and URL of who has it,
    Misconfigured if read-only."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Misconfigured(
            f"{path}: cannot open the state for writing ({error.strerror}); use a writable state, or a command that only reads"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        held = holder(path)
        pid, url = held.get("pid"), held.get("url")
        where = f" at {url}" if url else ""
        hint = (
            "stop it first (systemctl stop continual, or kill the process), or publish models into its watched folder"
            if url
            else "wait until it is done"
        )
        raise Busy(f"{path.parent} is being written by process {pid}{where}; {hint}", pid, url) from None
    tell(fd, {"pid": os.getpid(), "url": None})
    return fd


def tell(fd: int, body: dict[str, Any]) -> None:
    """Writes into the lock file who holds it."""
    data, _ = encode(body)
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def holder(path: Path) -> dict[str, Any]:
    """What the lock file says of its holder; empty if it says nothing or is half written. Says nothing about whether
    that process still runs."""
    try:
        _, _, text = path.read_bytes().partition(b"\n")
        body = json.loads(text)
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


@contextlib.contextmanager
def lease(directory: Path, generation: str) -> Iterator[None]:
    """Keeps `generation` from expiring while the block runs. On a read-only file system it yields without: nothing
    expires there."""
    while True:
        path = directory / f"{generation}-{secrets.token_hex(4)}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError:
            yield
            return
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # the writer took it for a dead reader's between the two calls
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def leased(directory: Path) -> set[str]:
    """Generations that a living reader has leased; leases of dead readers are removed."""
    found = set()
    for path in directory.iterdir():
        if path.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                found.add(path.name.rpartition("-")[0])
            finally:
                os.close(fd)
    return found
