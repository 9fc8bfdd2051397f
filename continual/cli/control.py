"""The commands that hold a daemon up and have it go on. They work beside a daemon and without one."""

from __future__ import annotations

import typer

from continual.cli import console, opened
from continual.cli.flags import OPENING, Flags, takes
from continual.texts import when

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
