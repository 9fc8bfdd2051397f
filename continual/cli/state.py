"""The commands that look at a state or change what is in it: its ledger, what is in force, how the merge is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from continual import texts
from continual.cli import console, opened
from continual.cli.flags import MACHINE, OPENING, Flags, Lines, takes

app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes(*OPENING)
def status(*, flags: Flags) -> None:
    """Show health, queue and last folds: the running daemon's answer, else what the state says."""
    from continual.cli.status import text
    from continual.service import status

    settings = opened.settings(flags)
    body = status.ask(settings.state) or status.at_rest(settings)
    if flags.json:
        console.emit(body)
    else:
        console.say(text(body), lines=True)


@app.command()
@takes(*OPENING)
def log(
    number: Annotated[int, typer.Option("--number", "-n", min=0, help="Newest records to show; 0 shows all.")] = 20,
    *,
    flags: Flags,
) -> None:
    """List what happened, newest last: the ledger of every candidate ever seen."""
    with opened.merge(flags) as merge:
        commits = merge.state.ledger.log[-number:]
    if flags.json:
        console.emit([texts.record(c) for c in commits])
    else:
        console.records(commits)


@app.command()
@takes(*OPENING)
def show(seq: Annotated[int, typer.Argument(help="Record number.")], *, flags: Flags) -> None:
    """Show one record whole."""
    with opened.merge(flags) as merge:
        body = texts.record(merge.state.ledger.get(seq))
    if flags.json:
        console.emit(body)
    else:
        console.table(("field", "value"), [(k, v) for k, v in body.items() if v is not None])


@app.command()
@takes(*OPENING)
def tag(
    name: Annotated[str | None, typer.Argument(help="Name to give; without one the tags are listed.")] = None,
    seq: Annotated[
        int | None, typer.Option("--at", help="Record number; default: the newest.", show_default=False)
    ] = None,
    *,
    flags: Flags,
) -> None:
    """Name a record, so that its generation is kept for good; or list the names."""
    with opened.merge(flags, write=name is not None) as merge:
        if name is not None:
            merge.state.tag(name, seq)
        tags = merge.state.ledger.tags
    if flags.json:
        console.emit(tags)
    else:
        console.table(("tag", "seq"), sorted(tags.items()))


@app.command()
@takes(*OPENING)
def rollback(
    seq: Annotated[int, typer.Argument(help="Record to go back to.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be undone and change nothing.")] = False,
    *,
    flags: Flags,
) -> None:
    """Go back to the merge of an earlier record. The folds after it come back only by 'retry'."""
    with opened.merge(flags, write=not dry_run) as merge:
        undone = merge.state.ledger.undone(seq)
        commit = None if dry_run else merge.state.rollback(seq)
    if flags.json:
        record = None if commit is None else commit.seq
        console.emit({"to": seq, "record": record, "undone": [texts.record(c) for c in undone]})
        return
    console.say(f"{'Would go' if dry_run else 'Went'} back to record {seq}; {len(undone)} folds undone")
    if undone:
        console.records(undone)


@app.command()
@takes(*OPENING)
def retry(
    model: Annotated[
        str, typer.Argument(help="Name, path, key or record number of a refused or rolled-back candidate.")
    ],
    *,
    flags: Flags,
) -> None:
    """Have a refused or rolled-back candidate looked at again."""
    from continual.state.entries import RetryEntry

    with opened.merge(flags, write=True) as merge:
        commits = merge.retry(model)
    if flags.json:
        console.emit([texts.record(c) for c in commits])
        return
    for commit in commits:
        console.say(f"{commit.of_kind(RetryEntry).candidate.name}: will be looked at again by 'run' or 'fold'")


@app.command()
@takes(*OPENING)
def scale(
    value: Annotated[
        str | None,
        typer.Argument(
            help="spread:C, norm:KAPPA, a number, auto (the rule's default), paper (its paper's) "
            "or tuned (what 'tune' chose); without one the scale in force is shown.",
            show_default=False,
        ),
    ] = None,
    lines: Lines = None,
    *,
    flags: Flags,
) -> None:
    """Show or change how the merge is read: its scale, and that of its layers. Nothing is folded again."""
    changes = value is not None or lines is not None
    with opened.merge(flags, write=changes) as merge:
        found = merge.rescale(value, lines) if changes else merge.scale()
    if flags.json:
        console.emit(found.to_mapping())
    else:
        console.say(f"scale {found}")


@app.command()
@takes("keep", "missing", "vocab", "gates", *MACHINE, *OPENING)
def unfold(
    model: Annotated[str, typer.Argument(help="Name, path, key or record number of a model in the merge.")],
    at: Annotated[
        Path | None, typer.Option("--at", help="Where the model is now, if it was moved.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it takes and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before others are folded again.")] = False,
    *,
    flags: Flags,
) -> None:
    """Take a model out of the merge: subtracted where the rule allows it, else the later ones are folded again without
    it."""
    commit = None
    with opened.merge(flags, write=not dry_run) as merge:
        plan = merge.look_unfold(model, at)
        if not flags.json:
            console.say(
                f"{plan.line()}: {texts.size(plan.read_bytes)} of models to read, "
                f"{texts.size(plan.disk_bytes)} of disk while it lasts"
            )
        if not (dry_run or plan.exact or yes or flags.json) and sys.stdin.isatty() and not typer.confirm("Go on?"):
            raise typer.Exit(1)
        if not dry_run:
            with console.progress() as progress:
                commit = merge.unfold(plan, progress)
    if flags.json:
        console.emit({"plan": plan, "record": None if commit is None else texts.record(commit)})
    elif commit is not None:
        console.say(f"{plan.name}: taken out as record {commit.seq}")


@app.command()
@takes("keep", "workers", "memory", *OPENING)
def combine(
    other: Annotated[Path, typer.Argument(help="Directory of another state of the same base and rule.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be added and change nothing.")] = False,
    *,
    flags: Flags,
) -> None:
    """Add the models of another state to this one: two machines fold, one merge comes of it. The other state stays as
    it is."""
    with opened.merge(flags, write=not dry_run) as merge, console.progress() as progress:
        folds, commit = merge.combine(other, dry_run=dry_run, progress=progress)
    if flags.json:
        record = None if commit is None else texts.record(commit)
        console.emit({"record": record, "added": [texts.record(c) for c in folds]})
        return
    console.say(f"{f'Added as record {commit.seq}' if commit else 'Would add'}: {len(folds)} models of {other}")
    console.records(folds)
