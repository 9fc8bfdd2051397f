"""The commands about what is watched and what is released: one look at the sources, a release by hand, a promotion."""

from __future__ import annotations

from typing import Annotated

import typer

from continual.cli import answered, console, opened, typed
from continual.cli.flags import GATES, MACHINE, OPENING, READING, SOURCES, Flags, View, takes

app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes("watch", "nested", *SOURCES, "settle", *GATES, *MACHINE, *OPENING)
def watch(
    once: Annotated[bool, typer.Option("--once", help="One look, then stop; 'continual run' goes on looking.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be taken and why; change nothing.")
    ] = False,
    *,
    flags: Flags,
) -> None:
    """Look once at the folders and at the Hub: take what is ready, or show what would be taken."""
    from continual.errors import Misconfigured
    from continual.service import logs
    from continual.service import once as looking

    if not once:
        raise Misconfigured("watch looks once: say --once; 'continual run' is what goes on looking")
    logs.configure(level="warning")
    with opened.merge(flags, write=not dry_run) as merge:
        sources = looking.watched(merge)
        if dry_run:
            with console.spinner("looking"):
                seen = list(looking.survey(merge, sources))
            if flags.json:
                console.emit(seen)
            else:
                console.seen(seen)
            return
        tried = []
        for found in looking.once(merge, sources):
            tried.append(found)
            if not flags.json:
                console.tried(found)
    if flags.json:
        console.emit([console.tried_body(found) for found in tried])
    elif not tried:
        console.say("Nothing new.")
    if any(found.trouble for found in tried):
        raise typer.Exit(3)
    raise typer.Exit(1 if any(found.outcome and found.outcome.refused for found in tried) else 0)


@app.command()
@takes("release", "tokenizer", *READING, *OPENING)
def release(
    at: Annotated[
        str | None,
        typer.Option("--at", help="Record to release (number or tag); default: the newest.", show_default=False),
    ] = None,
    view: View = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be released, with its model card; change nothing.")
    ] = False,
    *,
    flags: Flags,
) -> None:
    """Publish the merged model as a release on the Hub, unless it is out already."""
    from continual.service.control.requests import ReleaseRequest

    found = opened.act(
        flags, typed.request(ReleaseRequest, at=typed.record(at), view=view, dry_run=dry_run), quiet=flags.json
    )
    body = answered.fields(found["look" if dry_run else "released"])
    if flags.json:
        console.emit(body)
    elif dry_run:
        answered.release_look(body)
    else:
        answered.released(body)


@app.command()
@takes("tokenizer", *READING, *OPENING)
def promote(
    view: Annotated[
        str | None, typer.Argument(help="View of the settings file; default: the merge.", show_default=False)
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", help="Record (number or tag) that the canary has to be.", show_default=False),
    ] = None,
    *,
    flags: Flags,
) -> None:
    """Promote a canary: what is out beside the promoted merge, and watched, takes its place."""
    from continual.service.control.requests import PromoteRequest

    request = typed.request(PromoteRequest, at=typed.record(at), view=view)
    body = answered.fields(opened.act(flags, request, quiet=flags.json)["promoted"])
    if flags.json:
        console.emit(body)
    else:
        of = f" of the view {body['view']}" if body["view"] else ""
        console.say(f"Record {body['seq']}{of} {'is promoted' if body['done'] else 'is promoted by the daemon now'}.")
