"""The commands that look at a state or change what is in it: its ledger, what is in force, how the merge is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from continual import texts
from continual.cli import answered, completing, console, opened, recorded, typed
from continual.cli.flags import MACHINE, OPENING, Flags, Lines, Yes, takes
from continual.cli.proving import proving
from continual.errors import Misconfigured
from continual.outside import counted, few_shares

if TYPE_CHECKING:
    from continual.config import Settings
    from continual.texts import Json

app = typer.Typer(rich_markup_mode=None)
REFUSED_ROLLBACK = "rollback undoes folds"


@app.command()
@takes(*OPENING)
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, help="With --watch: seconds between two looks.")] = 2.0,
    *,
    flags: Flags,
) -> None:
    """Show health, queue and last folds: the running daemon's answer, else what the state says."""
    from continual.cli.status import text

    settings = opened.settings(flags)
    if watch:
        from continual.cli.live_status import watch as watched

        if flags.json:
            raise Misconfigured("--watch is for people: ask again with --json, or the daemon's /api/status")
        return watched(lambda: _asked(settings), every)
    body = _asked(settings)
    if flags.json:
        console.emit(body)
    else:
        console.say(text(body), lines=True)


def _asked(settings: Settings) -> dict[str, Json]:
    """The status of a state. Raises Misconfigured, Damaged."""
    from continual.service import asking

    body = asking.ask(settings.state)
    if body is None:
        from continual.service import status

        body = status.at_rest(settings)
    return body


@app.command()
@takes(*OPENING)
def log(
    number: Annotated[int, typer.Option("--number", "-n", min=0, help="Newest records to show; 0 shows all.")] = 20,
    graph: Annotated[
        bool, typer.Option("--graph", help="Draw what changed the merge, newest first, as git draws its history.")
    ] = False,
    *,
    flags: Flags,
) -> None:
    """List what happened, newest last: the ledger of every candidate ever seen, and which records can be gone back
    to."""
    from continual.state import going_back

    if graph and not flags.json:
        from continual.cli.graph import graph as drawn

        with opened.records(flags) as state:
            return console.say("\n".join(drawn(state.ledger, number)), lines=True)
    with opened.records(flags) as state:
        commits = state.ledger.log[-number:]
        generations = going_back.reachable(state)
    bodies = [{**texts.record(c), **going_back.marked(c, generations)} for c in commits]
    if flags.json:
        return console.emit(bodies)
    return recorded.many(bodies)


@app.command()
@takes(*OPENING)
def show(
    seq: Annotated[str, typer.Argument(help="Record number, a tag, or HEAD.", autocompletion=completing.refs)],
    *,
    flags: Flags,
) -> None:
    """Show one record whole, in words."""
    from continual.state.refs import must_be_named

    with opened.records(flags) as state:
        body = texts.record(state.ledger.get(must_be_named(state.ledger, seq)))
    if flags.json:
        console.emit(body)
    else:
        recorded.whole(body)


@app.command()
@takes(*OPENING)
def tag(
    name: Annotated[str | None, typer.Argument(help="Name to give; without one the tags are listed.")] = None,
    seq: Annotated[
        str | None,
        typer.Option(
            "--at",
            help="Record number or tag; default: the newest.",
            show_default=False,
            autocompletion=completing.refs,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Move the tag where it names another record.")] = False,
    *,
    flags: Flags,
) -> None:
    """Name a record, so that its generation is kept for good; or list the names."""
    if name is None:
        with opened.records(flags) as state:
            tags: Mapping[str, object] = state.ledger.tags
    else:
        from continual.service.control.requests import TagRequest

        found = opened.act(flags, typed.request(TagRequest, name=name, at=typed.record(seq), force=force))["tags"]
        assert isinstance(found, dict)
        tags = found
    if flags.json:
        console.emit(tags)
    else:
        console.table(("tag", "seq"), sorted(tags.items()))


@app.command()
@takes("keep", "keep_bytes", *OPENING)
def rollback(
    record: Annotated[
        str, typer.Argument(help="Record to go back to (number or tag).", autocompletion=completing.refs)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be undone and change nothing.")] = False,
    yes: Yes = False,
    *,
    flags: Flags,
) -> None:
    """Go back to the merge of an earlier record. The folds after it come back only by 'retry'."""
    from continual.service.control.requests import RollbackRequest

    expected = None
    if not (dry_run or yes):
        console.must_be_asked(REFUSED_ROLLBACK)
        look = opened.act(
            flags, typed.request(RollbackRequest, seq=typed.record(record), dry_run=True), quiet=flags.json
        )
        expected = len(answered.rows(look["undone"]))
        if not flags.json:
            answered.rollback(look)
        console.must_agree(f"{expected} folds would be undone. Go back?" if flags.json else "Go back?")
    asked = typed.request(RollbackRequest, seq=typed.record(record), dry_run=dry_run, expected=expected)
    done = opened.act(flags, asked, quiet=flags.json)
    if flags.json:
        console.emit(done)
    else:
        answered.rollback(done, whole=expected is None)


@app.command()
@takes(*OPENING)
def retry(
    model: Annotated[
        str,
        typer.Argument(
            help="Name, path, key or record number of a refused or rolled-back candidate.",
            autocompletion=completing.kept_out,
        ),
    ],
    *,
    flags: Flags,
) -> None:
    """Have a refused or rolled-back candidate looked at again."""
    from continual.service.control.requests import RetryRequest

    request = typed.request(RetryRequest, model=model, here=typed.here(model))
    found = answered.rows(opened.act(flags, request, quiet=flags.json)["records"])
    if flags.json:
        console.emit(found)
        return
    for record in found:
        console.say(f"{recorded.model_of(record)}: will be looked at again by 'run' or 'fold'")


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
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule", help="Rule to read by; 'continual rules' lists which can read which state.", show_default=False
        ),
    ] = None,
    *,
    flags: Flags,
) -> None:
    """Show or change how the merge is read: by which rule, its scale, and that of its layers. Nothing is folded
    again."""
    if value is None and lines is None and rule is None:
        with opened.looked(flags) as merge:
            now = merge.scale()
        found: dict[str, Json] = {"read": texts.jsonable(now.to_mapping()), "scale": str(now)}
    else:
        from continual.service.control.requests import ScaleRequest

        found = opened.act(flags, typed.request(ScaleRequest, value=value, lines=lines, rule=rule), quiet=flags.json)
    if flags.json:
        console.emit(found["read"])
    else:
        console.say(f"scale {found['scale']}")


@app.command()
@takes("keep", "keep_bytes", "missing", "vocab", "gates", *MACHINE, *OPENING)
def unfold(
    model: Annotated[
        str,
        typer.Argument(
            help="Name, path, key or record number of a model in the merge.", autocompletion=completing.merged
        ),
    ],
    at: Annotated[
        Path | None, typer.Option("--at", help="Where the model is now, if it was moved.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it takes and change nothing.")] = False,
    yes: Yes = False,
    certificate: Annotated[
        Path | None,
        typer.Option(
            "--certificate", help="Write there a proof of the removal that anybody can check.", show_default=False
        ),
    ] = None,
    *,
    flags: Flags,
) -> None:
    """Take a model out of the merge: subtracted where the rule allows it, else the later ones are folded again without
    it."""
    if certificate is None:
        _unfold(model, at, flags, dry_run=dry_run, yes=yes)
        return
    with proving(certificate, model, at, flags) as proof:
        if proof.seq is None:
            proof.seq = _unfold(model, at, flags, dry_run=dry_run, yes=yes)


def _unfold(model: str, at: Path | None, flags: Flags, *, dry_run: bool, yes: bool) -> int | None:
    """Takes a model out, and returns the number of the record of it; None of a dry run."""
    from continual.service.control.requests import UnfoldRequest

    where = None if at is None else typed.here(str(at))
    asked = typed.request(UnfoldRequest, model=model, here=typed.here(model), at=where, dry_run=dry_run)
    if dry_run or not yes:
        look = opened.act(flags, asked.model_copy(update={"dry_run": True}), quiet=flags.json)
        plan = answered.fields(look["plan"])
        if dry_run and flags.json:
            console.emit({"plan": plan, "record": None})
            return None
        if not flags.json:
            answered.unfold_plan(look)
        if dry_run:
            return None
        expected = 0 if plan["exact"] else len(answered.rows(plan["again"]))
        asked = asked.model_copy(update={"expected": expected})
        if expected:
            costs = f"{plan['name']}: {expected} later models would be folded again without it"
            console.must_be_asked(costs)
            console.must_agree(f"{costs}. Go on?")
    done = opened.act(flags, asked, quiet=flags.json)
    taken, record = answered.fields(done["plan"]), answered.fields(done["record"])
    if flags.json:
        console.emit({"plan": done["plan"], "record": done["record"]})
        return int(record["seq"])
    if yes:
        answered.unfold_plan(done)
    console.say(f"{taken['name']}: taken out as record {record['seq']}")
    return int(record["seq"])


@app.command()
@takes("keep", "keep_bytes", "workers", "memory", *OPENING)
def combine(
    other: Annotated[
        str,
        typer.Argument(help="Where another state of the same base is; of whole tensors also of the same rule."),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be added and change nothing.")] = False,
    *,
    flags: Flags,
) -> None:
    """Add the models of another state to this one: two machines fold, one merge comes of it. The other state stays as
    it is."""
    with opened.merge(flags, write=not dry_run) as merge, console.progress() as progress:
        folds, combined = merge.combine(other, dry_run=dry_run, progress=progress)
    if flags.json:
        record, cut = (None, {}) if combined is None else (texts.record(combined.commit), dict(combined.cut))
        console.emit({"record": record, "added": [texts.record(c) for c in folds], "cut": cut})
        return
    done = f"Added as record {combined.commit.seq}" if combined else "Would add"
    console.say(f"{done}: {counted(len(folds), 'model')} of {other}")
    if combined and combined.cut:
        console.say(f"cut off to make room, of the square of a model's length: {few_shares(combined.cut)}")
    recorded.many(texts.record(c) for c in folds)
