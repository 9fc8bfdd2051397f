"""The commands of the pool: who waits, why a model is or is not in the merge, and a round over those that wait."""

from __future__ import annotations

from typing import Annotated

import typer

from continual.cli import answered, console, opened, typed
from continual.cli.flags import GATES, MACHINE, OPENING, ROUNDS, Flags, takes

app = typer.Typer(rich_markup_mode=None)
pool = typer.Typer(
    rich_markup_mode=None, invoke_without_command=True, help="Show the candidates that wait for a round, and run one."
)
app.add_typer(pool, name="pool")


@pool.callback()
@takes(*OPENING)
def listed(context: typer.Context, *, flags: Flags) -> None:
    """Show the candidates that wait for a round; subcommands say why, and run a round."""
    if context.invoked_subcommand is not None:
        return
    with opened.records(flags) as state:
        waiting = state.ledger.pool
    if flags.json:
        console.emit([console.waiting_body(key, found) for key, found in waiting.items()])
        return
    console.table(
        ("model", "waits since", "rounds", "score", "z", "what the last round said"),
        [console.waiting_row(found) for found in waiting.values()],
    )
    if not waiting:
        console.say("Nothing waits.")


@pool.command()
@takes(*OPENING)
def why(
    model: Annotated[str, typer.Argument(help="Name, path or key of a candidate that was ever seen.")],
    *,
    flags: Flags,
) -> None:
    """Say what each round found of a candidate, and why it is or is not in the merge."""
    with opened.looked(flags) as merge:
        told = merge.why(model)
    if flags.json:
        console.emit(told.body())
    else:
        console.why(told)


@pool.command(name="round")
@takes("keep", "keep_bytes", *ROUNDS, *GATES, *MACHINE, *OPENING)
def round_(
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Score and try all that wait at the merge as it is; fold and record nothing."),
    ] = False,
    *,
    flags: Flags,
) -> None:
    """Run a round now: score all that wait, fold what is relevant, and settle the others' fates."""
    from continual.service.control.requests import RoundRequest

    found = opened.act(flags, typed.request(RoundRequest, dry_run=dry_run), quiet=flags.json)
    if flags.json:
        console.caution(found["unsupervised"])
        console.emit(found["round"])
    else:
        answered.round_told(answered.fields(found["round"]))
