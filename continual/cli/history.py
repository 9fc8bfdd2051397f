"""The commands that go by the history of a merge: what tells two records of it apart, and building it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from continual.cli import console, opened
from continual.cli.flags import MACHINE, OPENING, READING, Flags, takes
from continual.outside import counted, few
from continual.texts import figure, share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from continual.api.replaying import ReplayLook
    from continual.engine.comparing import Diff, DiffFigures
    from continual.replay import Replayed

app = typer.Typer(rich_markup_mode=None)
_HEAD = ("depth", "before", "after", "difference", "relative", "cosine", "rank")


@app.command()
@takes(*READING, *OPENING)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A record (number, tag, HEAD), or a model directory or repo.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with; default: HEAD.")] = "HEAD",
    tensors: Annotated[bool, typer.Option("--tensors", help="Show every tensor, not layers alone.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", help="Draw it there, too: a heat map (.svg) of layers and matrices.", show_default=False
        ),
    ] = None,
    *,
    flags: Flags,
) -> None:
    """Say what tells two merges apart: by layer, how long the difference of their task vectors is and which way it
    goes; and which models came and went. Nothing is changed."""
    from continual.publish.heat_map import check_picture, draw

    if picture is not None:
        check_picture(picture)
    with opened.merge(flags) as merge, console.progress() as progress:
        found = merge.diff(a, b, progress=progress)
    if picture is not None:
        draw(found, picture)
    if flags.json:
        return console.emit(found)
    _diff_told(found, tensors=tensors)
    if picture is not None:
        console.say(f"Wrote {picture}")


@app.command()
@takes("missing", "vocab", "gates", *MACHINE, *OPENING)
def replay(
    directory: Annotated[str, typer.Argument(help="Where to build it: a new directory, or one where this was begun.")],
    models: Annotated[
        list[Path] | None,
        typer.Option("--models", help="Directory below which the models are now; repeatable.", show_default=False),
    ] = None,
    combined: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="A state whose models were combined in, or a backup of it; repeatable.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look for every model and read it, and build nothing.")
    ] = False,
    *,
    flags: Flags,
) -> None:
    """Build the state again from its ledger and the models that it folded, and prove that it is equal, bit for bit."""
    with opened.merge(flags) as merge, console.progress() as progress:
        if dry_run:
            look = merge.look_replay(models or (), combined or (), progress=progress)
        else:
            found = merge.replay(directory, models or (), combined or (), progress=progress)
    if dry_run:
        _look_told(look, json=flags.json)
        raise typer.Exit(1 if any(one.why for one in look.models) else 0)
    if flags.json:
        console.emit(found)
    else:
        _replay_told(found)
    raise typer.Exit(0 if found.equal else 4)


def _look_told(found: ReplayLook, *, json: bool) -> None:
    """What a replay would do."""
    rows = [one.body() for one in found.models]
    if json:
        return console.emit({**found._asdict(), "models": rows})
    console.table(("record", "model", "place", "why not"), [tuple(row.values()) for row in rows])
    lacking = sum(bool(one.why) for one in found.models)
    said = f"{lacking} of them cannot be used" if lacking else "all of them are there, with the bytes that were folded"
    console.say(f"{counted(found.records, 'record')}, {counted(len(rows), 'model')}: {said}")
    return _left_told(found.left_out)


def _replay_told(found: Replayed) -> None:
    """What a replay came to."""
    _left_told(found.left_out)
    for one in found.differs:
        console.warn(f"differs: {one}")
    if not found.equal:
        for one in found.software:
            console.warn(f"was made otherwise: {one}")
    made = f"{counted(found.records, 'record')} made again in {found.directory}, {found.compared} of them compared"
    if found.equal:
        console.say(f"EQUAL: {counted(found.tensors, 'tensor')} of the newest merge, bit for bit; {made}")
    else:
        console.say(f"NOT equal: {counted(len(found.differs), 'difference')}; {made}")


def _left_told(left_out: Sequence[str]) -> None:
    for one in left_out:
        console.say(f"not built again: {one}")


def _diff_told(found: Diff, *, tensors: bool) -> None:
    """A comparison for people."""
    whole = found.whole
    places = [
        f"{word} (record {seq})" if seq is not None and word != str(seq) else word
        for word, seq in ((found.a, found.a_seq), (found.b, found.b_seq))
    ]
    if not whole.change:
        console.say(f"{places[0]} to {places[1]}: the merged task vectors are equal")
    else:
        told = [f"difference {whole.change:.4g}"]
        told += [] if whole.relative is None else [f"{share(whole.relative)} of the task vector before"]
        told += [] if whole.cosine is None else [f"cosine {whole.cosine:+.4f}"]
        told += [] if whole.rank is None else [f"stable rank of the difference {whole.rank:.3g}"]
        console.say(f"{places[0]} to {places[1]}: {', '.join(told)}")
    if found.came is None or found.went is None:
        console.say("models: not known, as the files of one side do not say which models are in them")
    else:
        for word, models in (("came", found.came), ("went", found.went)):
            if models:
                console.say(f"{word}: {counted(len(models), 'model')}, {few((m.name for m in models), most=10)}")
        for one in found.weighed or ():
            console.say(f"weighed otherwise: {one.name}, {one.before:.4g} before, {one.after:.4g} after")
    if not whole.change:
        return
    name = "tensor" if tensors else "layer"
    console.table(
        (name, *_HEAD),
        [
            (one.name, f"{one.depth:.2f}", *_figures(one.figures))
            for one in (found.tensors if tensors else found.layers)
        ],
    )


def _figures(one: DiffFigures) -> tuple[str, ...]:
    return (
        f"{one.before:.4g}",
        f"{one.after:.4g}",
        f"{one.change:.4g}",
        share(one.relative),
        figure(one.cosine, "+.4f"),
        figure(one.rank, ".3g"),
    )
