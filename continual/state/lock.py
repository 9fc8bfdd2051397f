"""Who writes to a state, and what is said of it to somebody else who wants to. How it is known is the matter of
holding.py."""

from __future__ import annotations

import errno
from typing import NamedTuple

from continual.errors import Busy, Misconfigured
from continual.state import framing, holding
from continual.state.durable import environment
from continual.state.holding import Lock
from continual.stores import Where

_FOR_GOOD = (errno.EACCES, errno.EPERM, errno.EROFS)


def take(path: Where) -> Lock:
    """Locks the state in `path` for writing. Raises Busy with pid and URL of who has it, Misconfigured if read-only,
    Retry where the disk or the store gets in the way.

    On an object store this waits for a writer that is not heard of, until its lease has run out."""
    with environment(f"cannot lock {path}"):
        try:
            return holding.of(path).lock(path)
        except BlockingIOError:
            raise _busy(path) from None
        except OSError as error:
            if error.errno not in _FOR_GOOD:
                raise
            raise Misconfigured(
                f"{path / 'lock'}: cannot open the state for writing ({error.strerror}); "
                "use a writable state, or a command that only reads"
            ) from None


def _busy(path: Where) -> Busy:
    found = holder(path)
    who = f"process {found.said}" if found.pid is not None else "another process"
    where = f" at {found.url}" if found.url else ""
    hint = (
        "stop it first (systemctl stop continual, or kill the process), or publish models into its watched folder"
        if found.url
        else "wait until it is done"
    )
    return Busy(f"{path} is being written by {who}{where}; {hint}", found.pid, found.url)


class Holder(NamedTuple):
    """What the lock says of the process that holds it: its pid, where its daemon answers, and the name of its
    machine."""

    pid: int | None = None
    url: str | None = None
    host: str | None = None

    @property
    def said(self) -> str:
        """The process as messages name it."""
        return f"{self.pid} on {self.host}" if self.host else f"{self.pid}"


def holder(path: Where) -> Holder:
    """What the lock of the state in `path` says of its holder; nothing if it is half written, or was given back. It
    does not say whether that process still runs."""
    try:
        body = framing.said(holding.of(path).said(path))
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


def held(path: Where) -> Holder | None:
    """Who has the lock of the state in `path`; None where nobody has, as far as can be told."""
    found = holder(path)
    if found.pid is None:
        return None
    try:
        return found if holding.of(path).is_locked(path) else None
    except OSError:
        return found
