"""The commands that hold a daemon up, have it go on, and end it in order. They work beside a daemon and without one."""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING

import typer

from continual.cli import console, opened
from continual.cli.flags import OPENING, Flags, takes
from continual.texts import when

if TYPE_CHECKING:
    pass

app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes(*OPENING)
def pause(*, flags: Flags) -> None:
    """Have the daemon fold nothing until 'resume', also after a restart. What is published waits; the fold under way is
    ended."""
    from continual.service.control.requests import PauseRequest

    since = str(opened.act(flags, PauseRequest(), quiet=flags.json)["paused"])
    if flags.json:
        console.emit({"paused": since})
    else:
        console.say(f"The daemon folds nothing, since {when(since) if since else 'a time that is not known'}.")


@app.command()
@takes(*OPENING)
def resume(*, flags: Flags) -> None:
    """Have the daemon fold again after 'pause'."""
    from continual.service.control.requests import ResumeRequest

    was = bool(opened.act(flags, ResumeRequest(), quiet=flags.json)["was_paused"])
    if flags.json:
        console.emit({"paused": None, "was_paused": was})
    else:
        console.say("The daemon folds again." if was else "It was not paused.")


@app.command()
@takes(*OPENING)
def drain(*, flags: Flags) -> None:
    """Have the daemon end when the fold under way is done, however long that takes, and wait until it has. What waits
    is folded by the next one."""
    from continual.errors import Busy
    from continual.service.control.parley import Hearing
    from continual.service.control.requests import DrainRequest
    from continual.state import lock

    asked = opened.settings(flags)
    with console.progress() as progress:
        hear = Hearing(progress, (lambda _: None) if flags.json else console.warn)
        answer = opened.by_daemon(flags, asked, DrainRequest(), hear)
    pid = None if answer is None else answer["pid"]
    if isinstance(pid, int):
        _wait(pid)
    elif (holder := lock.held(asked.state)) is not None:
        raise Busy(
            f"{asked.state} is open in process {holder.said}, which takes no requests of this user; stop it by a signal"
        )
    if flags.json:
        console.emit({"drained": pid})
    else:
        console.say("No daemon runs." if pid is None else f"The daemon has ended (process {pid}); nothing is lost.")


def _wait(pid: int) -> None:
    """Returns once the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            select.select([fd], [], [])
        finally:
            os.close(fd)
