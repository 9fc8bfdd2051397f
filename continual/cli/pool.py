"""The commands of the pool: who waits, why one is or is not in the merge, and a round over them. No logic, as in `cli`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from continual.cli import opened
from continual.cli.flags import (
    BaseDir,
    Config,
    Device,
    Heads,
    Json,
    MaxBase,
    Memory,
    Missing,
    Objective,
    Rounds,
    Rows,
    Select,
    StateDir,
    Updates,
    Vocab,
    Weight,
    Workers,
)

if TYPE_CHECKING:
    from continual.state.ledger import Waiting

app = typer.Typer(rich_markup_mode=None)
pool = typer.Typer(
    rich_markup_mode=None, invoke_without_command=True, help="Show the candidates that wait for a round, and run one."
)
app.add_typer(pool, name="pool")


@pool.callback()
def listed(context: typer.Context, state: StateDir = None, config: Config = None, json: Json = False) -> None:
    """Show the candidates that wait for a round; subcommands say why, and run a round."""
    if context.invoked_subcommand is not None:
        return
    from continual.cli import console
    from continual.state.fields import body_of

    with opened.merge(config, state=state) as merge:
        waiting = merge.pool()
    if json:
        console.emit(
            [
                {
                    "key": key,
                    "since": w.since,
                    "rounds": w.rounds,
                    **_identity(w),
                    "last": body_of(w.last) if w.last else None,
                }
                for key, w in waiting.items()
            ]
        )
        return
    console.table(
        ("model", "waits since", "rounds", "score", "z", "what the last round said"),
        [console.waiting_row(w) for w in waiting.values()],
    )
    if not waiting:
        console.say("Nothing waits.")


@pool.command()
def why(
    model: Annotated[str, typer.Argument(help="Name, path or key of a candidate that was ever seen.")],
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Say what each round found of a candidate, and why it is or is not in the merge."""
    from continual.cli import console

    with opened.merge(config, state=state) as merge:
        told = merge.why(model)
    if json:
        console.emit(told.body())
        return
    console.say(
        f"{told.name}: {told.fate}{f' ({told.reason})' if told.reason else ''}, first seen {told.since[:19]}Z at {told.origin}"
    )
    console.say(told.message)
    if told.rounds:
        console.table(
            ("record", "when", "members", "scored better", "score", "change", "error", "z", "weight", "said"),
            [console.round_row(r) for r in told.rounds],
        )


@pool.command(name="round")
def round_(
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Score and try all that wait at the merge as it is; fold and record nothing."),
    ] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", help="Generations kept besides tagged ones.", show_default=False)
    ] = None,
    select: Select = None,
    objective: Objective = None,
    rows: Rows = None,
    heads: Heads = None,
    rounds: Rounds = None,
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
    """Run a round now: score all that wait, fold what is relevant, and settle the others' fates."""
    flags = {k: v for k, v in locals().items() if k not in ("dry_run", "config", "json")}
    from continual.cli import console

    with opened.merge(config, write=not dry_run, **flags) as merge, console.progress() as progress:
        console.caution(merge.asked())
        found = merge.look_round(progress) if dry_run else merge.round(progress, None if json else console.heard)
    if json:
        console.emit(console.round_body(found))
    else:
        console.round_told(found)


def _identity(waiting: Waiting) -> dict[str, Any]:
    found = waiting.candidate
    return {"name": found.name, "origin": found.origin, "form": found.form, "bytes": found.nbytes}
