"""`continual doctor`: whether all is there that the daemon will need."""

from __future__ import annotations

import typer

from continual.cli import console, ending, opened
from continual.cli.flags import FLAGS, Flags, takes

app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes(*[name for name in FLAGS if name != "json"], "json")
def doctor(*, flags: Flags) -> None:
    """Look whether all is there that the daemon will need: settings, state, disk, base, folders, device, memory, Hub,
    and each machine of a cluster; say what to do where it is not. Nothing is changed. The exit code is 3 where
    something is missing."""
    from continual.service import doctor as service

    settings = opened.settings(flags)
    with console.spinner("looking"):
        found = service.look(settings, flags.client)
    failed = any(one.level == "fail" for one in found)
    if flags.json:
        console.emit([one._asdict() for one in found])
    else:
        console.table(
            ("", "about", "what"),
            [(one.level, one.about, f"{one.told}{f' -> {one.todo}' if one.todo else ''}") for one in found],
        )
    if failed:
        raise typer.Exit(ending.ENVIRONMENT)
