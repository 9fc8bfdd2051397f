"""The command that chooses how the merge is read, by what candidates are worth."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from continual.cli import console, opened
from continual.cli.flags import MACHINE, OPENING, Flags, takes
from continual.cli.typed import Worth
from continual.errors import Misconfigured

if TYPE_CHECKING:
    from continual.rules import ReadOptions
    from continual.rules.scale import Policy
    from continual.tuning import Evaluation, Weighing

app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes(*MACHINE, *OPENING)
def tune(
    command: Annotated[
        str | None,
        typer.Option(
            "--command",
            help="Says what a model is worth: its last line is the score; {model} is the directory.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="Calibration rows: a JSONL file with text and label.", show_default=False),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="Of the rows: causal-lm, classification or heads.", show_default=False),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option("--heads", help="Prompts of each label (JSON), for the objective heads.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows evaluated at a time.")] = 16,
    candidates: Annotated[int, typer.Option("--candidates", help="Evaluations, at least 3.")] = 20,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="Kind of scale to search: norm, number or spread; default: the one in force.",
            show_default=False,
        ),
    ] = None,
    around: Annotated[
        float | None,
        typer.Option("--around", help="Value to search around; default: the one in force.", show_default=False),
    ] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Search LiNeS' slope too, with a third of the candidates.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Where the score is in a JSON line of the command, as results.accuracy.", show_default=False
        ),
    ] = None,
    lower: Annotated[bool, typer.Option("--lower", help="The command's score is better where it is lower.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", help="Seconds the command may take for a candidate.", show_default=False),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Where the scratch file goes; default: a temporary directory.", show_default=False),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="Rule to read by; default: the one in force.", show_default=False),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Find the weights of the models instead (a state of adapters)."),
    ] = False,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            help="With --weights: models that share a factor, as NAME,NAME or a glob; default: one each; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Evaluate and print, and record nothing.")] = False,
    *,
    flags: Flags,
) -> None:
    """Find how large the merged task vector should be, or how much each model weighs in it, by evaluating candidates,
    and record it. Nothing is folded again."""
    from continual.tuning import Tuning, Weighing

    worth = Worth(command, rows, objective, heads, batch, key, lower, timeout)
    evaluation = worth.evaluation()
    if group and not weights:
        raise Misconfigured("--group is for --weights")
    if weights:
        if policy is not None or around is not None or lines:
            raise Misconfigured("--weights finds the weights alone: leave out --policy, --around and --lines")
        groups = tuple(tuple(words.split(",")) for words in group or ())
        return _weigh(evaluation, Weighing(candidates, groups, work, dry_run, rule), flags)
    wanted = Tuning(candidates, cast("Policy | None", policy), around, lines, work, dry_run, rule)
    signal.signal(signal.SIGTERM, _stop)
    with opened.merge(flags, write=not dry_run) as merge, console.progress() as progress:
        tuned = merge.tune(evaluation, wanted, progress, None if flags.json else console.trial)
    if flags.json:
        console.emit(console.tuned_body(tuned))
    else:
        console.tuned(tuned)


def _weigh(evaluation: Evaluation, wanted: Weighing, flags: Flags) -> None:
    """Finds the weights of the models."""
    signal.signal(signal.SIGTERM, _stop)
    with opened.merge(flags, write=not wanted.dry_run) as merge, console.progress() as progress:
        names = {fold.entry.candidate.key: fold.entry.candidate.name for fold in merge.state.ledger.folds()}

        def told(options: ReadOptions, score: float) -> None:
            shown = ", ".join(f"{names[key]} {weight:g}" for key, weight in options.weights)
            console.warn(f"{score:.6g}: {shown}")

        tuned = merge.tune_weights(evaluation, wanted, progress, None if flags.json else told)
    if flags.json:
        console.emit(console.tuned_body(tuned))
        return
    before, weights = tuned.entry.before.weights or {}, dict(tuned.read.weights)
    console.table(
        ("model", "weight before", "weight"),
        [(names[key], f"{before[key]:g}", f"{weights[key]:g}") for key in names if key in weights],
    )
    console.say(console.tuned_line(tuned))


def _stop(_number: int, _frame: object) -> NoReturn:
    """Makes a termination end like an interrupt: the command that runs is stopped and the scratch file removed."""
    raise SystemExit(128 + signal.SIGTERM)
