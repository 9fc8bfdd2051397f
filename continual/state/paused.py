"""Whether folding is paused: a file of the state, so that a pause outlives the daemon. That the file is there is the
pause; its contents, the time since when, are for people."""

from __future__ import annotations

from datetime import UTC, datetime

from continual.errors import Damaged
from continual.state import framing, storing
from continual.state.durable import environment
from continual.stores import Where

NAME = "paused"
"""Of the file, in the directory of the state."""


def pause(path: Where) -> str:
    """Pauses folding into the state in `path`; returns since when it is paused. On disk when it returns. Raises
    Retry."""
    if (before := since(path)) is not None:
        return before
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with environment("cannot pause"):
        storing.replace(path / NAME, framing.encode({"since": now})[0])
    return now


def resume(path: Where) -> bool:
    """Ends the pause; whether there was one. Raises Retry."""
    was = since(path) is not None
    with environment("cannot resume"):
        storing.remove(path / NAME)
        storing.sync(path)
    return was


def since(path: Where) -> str | None:
    """Since when folding is paused; None if it is not. A file that was altered is a pause of an unknown time."""
    if not (path / NAME).exists():
        return None
    try:
        return str(framing.decode(path / NAME)[0].get("since", ""))
    except Damaged:
        return ""
