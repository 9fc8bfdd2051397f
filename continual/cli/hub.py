"""The commands about what is watched and what is released: one look at the sources, a release by hand. No logic, as in
`cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from continual.cli import opened
from continual.cli.flags import (
    BaseDir,
    Config,
    Device,
    HubFlags,
    Json,
    MaxBase,
    Memory,
    Missing,
    ReleaseFlags,
    SourceFlags,
    StateDir,
    Updates,
    Vocab,
    Weight,
    Workers,
)

app = typer.Typer(rich_markup_mode=None)


@app.command()
def watch(
    once: Annotated[bool, typer.Option("--once", help="One look, then stop; 'continual run' goes on looking.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be taken and why; change nothing.")
    ] = False,
    watch: Annotated[
        list[Path] | None, typer.Option("--watch", help="Folder in which fine-tunes are published; repeatable.")
    ] = None,
    hub: HubFlags = None,
    sources: SourceFlags = None,
    settle: Annotated[
        float | None, typer.Option("--settle", help="Seconds a model's files must be still.", show_default=False)
    ] = None,
    weight: Weight = None,
    updates: Updates = None,
    missing: Missing = None,
    vocab: Vocab = None,
    max_base_ratio: MaxBase = None,
    base: BaseDir = None,
    device: Device = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Look once at the folders and at the Hub: take what is ready, or show what would be taken."""
    flags = {k: v for k, v in locals().items() if k not in ("once", "dry_run", "config", "json")}
    from continual.cli import console
    from continual.errors import Misconfigured
    from continual.service import once as watching

    if not once:
        raise Misconfigured("watch looks once: say --once; 'continual run' is what goes on looking")
    with opened.merge(config, write=not dry_run, **flags) as merge:
        looked_at = watching.watched(merge)
        if dry_run:
            with console.spinner("looking"):
                seen = list(watching.survey(merge, looked_at))
            console.emit(seen) if json else console.seen(seen)
            return
        tried = []
        for found in watching.once(merge, looked_at):
            tried.append(found)
            if not json:
                good = found.outcome is not None and not found.outcome.refused
                (console.say if good else console.warn)(found.outcome.line() if found.outcome else f"{found.trouble}")
    if json:
        console.emit(
            [{"model": t.model, "trouble": t.trouble, **(t.outcome.summary() if t.outcome else {})} for t in tried]
        )
    elif not tried:
        console.say("Nothing new.")
    if any(t.trouble for t in tried):
        raise typer.Exit(3)
    raise typer.Exit(1 if any(t.outcome and t.outcome.refused for t in tried) else 0)


@app.command()
def release(
    at: Annotated[
        int | None, typer.Option("--at", help="Record to release; default: the newest.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be released, with its model card; change nothing.")
    ] = False,
    release: ReleaseFlags = None,
    base: BaseDir = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Publish the merged model as a release on the Hub, unless it is out already."""
    flags = {k: v for k, v in locals().items() if k not in ("at", "dry_run", "config", "json")}
    from continual.cli import console
    from continual.service import release as releasing

    with opened.merge(config, write=not dry_run, **flags) as merge:
        if dry_run:
            found = releasing.look(merge, at)
            console.emit(found._asdict()) if json else console.release_look(found)
            return
        out = releasing.release(merge, at)  # the client shows how far the upload is
        merge.state.record(releasing.entry(out))
    if json:
        console.emit(out)
    else:
        console.say(
            f"{'Released' if out.new else 'Was out already:'} record {out.seq} as {out.url}{f', tag {out.tag}' if out.tag else ''}"
        )
