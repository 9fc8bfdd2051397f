"""What goes over the socket, and where it lies. The command sends one line with its request. The daemon answers with
lines, each a JSON object with one key:

    heard      what the daemon does first; null where it does nothing
    progress   [stage, done, total]
    note       a line for people
    answer     what came of it; the last line
    error      {kind, message, reason, after}; the last line

Errors travel by the name of their class, so that a command ends as if it had done the work itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from continual import errors
from continual.errors import ContinualError, Refuse, Retry
from continual.executors.contract import Progress
from continual.state.durable import trouble
from continual.texts import Json

NAME = "control.sock"
"""Of the socket, in the directory of the state."""
LONGEST = 64 << 10
"""Bytes of a request."""
_PATH = 107
"""Bytes that the path of a Unix socket may have (sun_path in unix(7), without its end)."""
_KINDS = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ContinualError) and kind is not Refuse
}


class Hearing(NamedTuple):
    """Who hears how far a command is: its progress, and lines for people."""

    progress: Progress
    note: Callable[[str], None]


class Bug(Exception):
    """The daemon met a bug of its own while it did what was asked. Its log has the trace."""


@contextlib.contextmanager
def address(state: Path) -> Iterator[str]:
    """The path of the socket of the state in `state`, for as long as the block runs; by way of the opened directory
    where the path itself is too long for a socket. Raises OSError where there is no such directory."""
    path = str(state / NAME)
    if len(os.fsencode(path)) <= _PATH:
        yield path
        return
    fd = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{NAME}"
    finally:
        os.close(fd)


def line(body: Mapping[str, Json]) -> bytes:
    """A line with this object."""
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def error_body(error: BaseException) -> dict[str, Json]:
    """An error as it travels. One of the operating system is no bug: a command that meets it itself ends so, too."""
    if isinstance(error, OSError):
        error = Retry(trouble(error))
    kind = type(error).__name__ if isinstance(error, ContinualError) else "Bug"
    if kind not in _KINDS and isinstance(error, ContinualError):  # of another room, such as the Hub's Trouble
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in {*_KINDS, "Refuse"})
    found: dict[str, Json] = {"kind": kind, "message": str(error)}
    if isinstance(error, Refuse):
        found["reason"] = error.reason
    if isinstance(error, Retry):
        found["after"] = error.after
    return found


def error_of(body: Mapping[str, Json]) -> Exception:
    """The error that `error_body` wrote."""
    kind, message, after = body.get("kind"), str(body.get("message")), body.get("after")
    if kind == "Refuse":
        return Refuse(str(body.get("reason")), message)
    found = _KINDS.get(str(kind))
    if found is None:
        return Bug(message)
    if issubclass(found, Retry):
        return found(message, float(after) if isinstance(after, int | float) else 0.0)
    return found(message)
