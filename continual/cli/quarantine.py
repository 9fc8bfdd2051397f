"""The commands about what is kept out: the list, one of them whole, and letting one in in spite of doubts."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from continual import texts
from continual.cli import answered, completing, console, opened, recorded, typed
from continual.cli.flags import OPENING, Flags, takes
from continual.errors import Misconfigured

if TYPE_CHECKING:
    from continual.service.control.requests import DropRequest, RetryRequest

_HELD = "unclear"
"""The reason of those of which an evaluation does not tell: they wait for a person."""
app = typer.Typer(rich_markup_mode=None)
quarantine = typer.Typer(
    rich_markup_mode=None,
    invoke_without_command=True,
    help="Show the models that are kept out, and why; accept one in spite of doubts, or drop it.",
)
app.add_typer(quarantine, name="quarantine")

Kept = Annotated[
    str,
    typer.Argument(
        help="Name, path, key or record number of a refused or rolled-back candidate.",
        autocompletion=completing.kept_out,
    ),
]


@quarantine.callback()
@takes(*OPENING)
def listed(context: typer.Context, *, flags: Flags) -> None:
    """Show the models that are kept out, and why; subcommands show one whole, accept one, or drop it."""
    if context.invoked_subcommand is not None:
        return
    with opened.looked(flags) as merge:
        found = [texts.record(commit) for commit in merge.quarantine()]
    if flags.json:
        console.emit(found)
        return
    console.table(
        ("seq", "time", "model", "fate", "reason", "what"),
        [
            (
                row["seq"],
                texts.when(str(row["time"])),
                recorded.model_of(row),
                "held" if row["reason"] == _HELD else row["fate"],
                row["reason"],
                row["message"],
            )
            for row in found
        ],
    )
    if not found:
        console.say("Nothing is kept out.")


@quarantine.command()
@takes(*OPENING)
def show(model: Kept, *, flags: Flags) -> None:
    """Show why a model is kept out: its record, with the settings by which it was refused."""
    with opened.looked(flags) as merge:
        found = [texts.record(commit) for commit in merge.kept_out(model)]
    if not found:
        raise Misconfigured(f"{model}: nothing of this name, path, key or record number is kept out")
    console.emit(found)


@quarantine.command()
@takes(*OPENING)
def accept(
    model: Kept,
    because: Annotated[str, typer.Option("--because", help="Why it is to be folded in spite of doubts.")],
    *,
    flags: Flags,
) -> None:
    """Have a refused model looked at again, and folded in spite of doubts (its norms, noise, copies): gates that go by
    likelihood only warn of it. Who said so and why is in the ledger."""
    from continual.service.control.requests import RetryRequest

    _decided(RetryRequest, model, because, flags, "accepted; it will be looked at again by 'run' or 'fold'")


@quarantine.command()
@takes(*OPENING)
def drop(
    model: Kept,
    because: Annotated[str | None, typer.Option("--because", help="Why it is not to come in.")] = None,
    *,
    flags: Flags,
) -> None:
    """Take a model off the list: it stays out, whatever settings change, until 'continual retry'. Who said so is in the
    ledger."""
    from continual.service.control.requests import DropRequest

    _decided(DropRequest, model, because, flags, "dropped; 'continual retry' has it looked at again")


def _decided(kind: type[RetryRequest | DropRequest], model: str, because: str | None, flags: Flags, said: str) -> None:
    """What a person decides of a model that is kept out, and what is said of each that it was."""
    request = typed.request(kind, model=model, here=typed.here(model), because=because, by=getpass.getuser())
    found = answered.rows(opened.act(flags, request, quiet=flags.json)["records"])
    if flags.json:
        console.emit(found)
        return
    for record in found:
        console.say(f"{recorded.model_of(record)}: {said}")
