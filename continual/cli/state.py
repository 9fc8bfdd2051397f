"""The commands that look at a state or change what is in it: its ledger, what is in force, how it is read. No logic, as
in `cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from continual import texts
from continual.cli import opened
from continual.cli.flags import BaseDir, Config, Device, Json, Lines, Memory, Missing, StateDir, Vocab, Workers

app = typer.Typer(rich_markup_mode=None)


@app.command()
def status(state: StateDir = None, config: Config = None, json: Json = False) -> None:
    """Show health, queue and last folds: the running daemon's answer, else what the state says."""
    from continual.cli import console
    from continual.cli.status import text
    from continual.service import status

    settings = opened.settings(config, state=state)
    body = status.ask(settings.state) or status.at_rest(settings)
    if json:
        console.emit(body)
    else:
        console.say(text(body))


@app.command()
def log(
    number: Annotated[int, typer.Option("--number", "-n", min=0, help="Newest records to show; 0 shows all.")] = 20,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """List what happened, newest last: the ledger of every candidate ever seen."""
    from continual.cli import console

    with opened.merge(config, state=state) as merge:
        commits = list(merge.state.ledger.log)[-number:]
    if json:
        console.emit([texts.record(c) for c in commits])
    else:
        console.table(console.LOG_HEAD, [console.log_row(c) for c in commits])


@app.command()
def show(
    seq: Annotated[int, typer.Argument(help="Record number.")],
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Show one record whole."""
    from continual.cli import console

    with opened.merge(config, state=state) as merge:
        body = texts.record(merge.state.ledger.get(seq))
    if json:
        console.emit(body)
    else:
        console.table(("field", "value"), [(k, v) for k, v in body.items() if v is not None])


@app.command()
def tag(
    name: Annotated[str | None, typer.Argument(help="Name to give; without one the tags are listed.")] = None,
    seq: Annotated[
        int | None, typer.Option("--at", help="Record number; default: the newest.", show_default=False)
    ] = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Name a record, so that its generation is kept for good; or list the names."""
    from continual.cli import console

    with opened.merge(config, write=name is not None, state=state) as merge:
        if name is not None:
            merge.state.tag(name, seq)
        tags = merge.state.ledger.tags
    if json:
        console.emit(tags)
    else:
        console.table(("tag", "seq"), sorted(tags.items()))


@app.command()
def rollback(
    seq: Annotated[int, typer.Argument(help="Record to go back to.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be undone and change nothing.")] = False,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Go back to the merge of an earlier record. The folds after it come back only by 'retry'."""
    from continual.cli import console

    with opened.merge(config, write=not dry_run, state=state) as merge:
        undone = merge.state.ledger.undone(seq)
        commit = None if dry_run else merge.state.rollback(seq)
    if json:
        console.emit({"to": seq, "record": commit and commit.seq, "undone": [texts.record(c) for c in undone]})
        return
    console.say(f"{'Would go' if dry_run else 'Went'} back to record {seq}; {len(undone)} folds undone")
    if undone:
        console.table(console.LOG_HEAD, [console.log_row(c) for c in undone])


@app.command()
def retry(
    model: Annotated[
        str, typer.Argument(help="Name, path, key or record number of a refused or rolled-back candidate.")
    ],
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Have a refused or rolled-back candidate looked at again."""
    from continual.cli import console
    from continual.state.entries import RetryEntry

    with opened.merge(config, write=True, state=state) as merge:
        commits = merge.retry(model)
    if json:
        console.emit([texts.record(c) for c in commits])
        return
    for commit in commits:
        console.say(f"{commit.of_kind(RetryEntry).candidate.name}: will be looked at again by 'run' or 'fold'")


@app.command()
def verify(state: StateDir = None, config: Config = None, json: Json = False) -> None:
    """Check every byte of the state against its receipt."""
    from continual.cli import console
    from continual.state import verify

    with opened.merge(config, state=state) as merge, console.progress() as progress:
        findings = verify.verify(merge.state, lambda done, total: progress("verify", done, total))
    if json:
        console.emit({"ok": not findings, "findings": findings})
    else:
        for finding in findings:
            console.warn(finding)
        console.say(f"{len(findings)} findings" if findings else "clean: every byte is as it was written")
    raise typer.Exit(4 if findings else 0)


@app.command()
def scale(
    value: Annotated[
        str | None,
        typer.Argument(
            help="spread:C, norm:KAPPA, a number, auto (the rule's default), paper (its paper's) or tuned (what 'tune' chose); without one the scale in force is shown.",
            show_default=False,
        ),
    ] = None,
    lines: Lines = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Show or change how the merge is read: its scale, and that of its layers. Nothing is folded again."""
    from continual.cli import console
    from continual.rules import ReadOptions

    changed = value is not None or lines is not None
    with opened.merge(config, write=changed, state=state) as merge:
        found = (
            merge.rescale(value, lines)
            if changed
            else ReadOptions.from_mapping(merge.state.ledger.read_options(merge.state.ledger.head.seq))
        )
    if json:
        console.emit(found.to_mapping())
    else:
        console.say(f"scale {found}")


@app.command()
def unfold(
    model: Annotated[str, typer.Argument(help="Name, path, key or record number of a model in the merge.")],
    at: Annotated[
        Path | None, typer.Option("--at", help="Where the model is now, if it was moved.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it takes and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before others are folded again.")] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", help="Generations kept besides tagged ones.", show_default=False)
    ] = None,
    missing: Missing = None,
    vocab: Vocab = None,
    base: BaseDir = None,
    device: Device = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Take a model out of the merge: subtracted where the rule allows it, else the later ones are folded again without
    it."""
    from continual.cli import console

    flags = {
        "missing": missing,
        "vocab": vocab,
        "base": base,
        "device": device,
        "workers": workers,
        "memory": memory,
        "state": state,
        "keep": keep,
    }
    with opened.merge(config, write=not dry_run, **flags) as merge:
        plan = merge.look_unfold(model, at)
        if not json:
            console.say(
                f"{plan.line()}: {texts.size(plan.read_bytes)} of models to read, {texts.size(plan.disk_bytes)} of disk while it lasts"
            )
        if not (dry_run or plan.exact or yes or json) and sys.stdin.isatty() and not typer.confirm("Go on?"):
            raise typer.Exit(1)
        commit = None
        if not dry_run:
            with console.progress() as progress:
                commit = merge.unfold(plan, progress)
    if json:
        console.emit({"plan": plan, "record": texts.record(commit) if commit else None})
    elif commit:
        console.say(f"{plan.name}: taken out as record {commit.seq}")


@app.command()
def combine(
    other: Annotated[Path, typer.Argument(help="Directory of another state of the same base and rule.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be added and change nothing.")] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", help="Generations kept besides tagged ones.", show_default=False)
    ] = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Add the models of another state to this one: two machines fold, one merge comes of it. The other state stays as
    it is."""
    from continual.cli import console

    flags = {"workers": workers, "memory": memory, "state": state, "keep": keep}
    with opened.merge(config, write=not dry_run, **flags) as merge, console.progress() as progress:
        folds, commit = merge.combine(other, dry_run=dry_run, progress=progress)
    if json:
        console.emit({"record": texts.record(commit) if commit else None, "added": [texts.record(c) for c in folds]})
        return
    console.say(f"{f'Added as record {commit.seq}' if commit else 'Would add'}: {len(folds)} models of {other}")
    console.table(console.LOG_HEAD, [console.log_row(c) for c in folds])
