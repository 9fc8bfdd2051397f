"""The command that chooses how the merge is read by what candidates are worth. No logic, as in `cli`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from continual.cli import opened
from continual.cli.flags import BaseDir, Config, Device, Json, Memory, StateDir, Workers

if TYPE_CHECKING:
    from continual.rules import ReadOptions
    from continual.rules.scale import Policy
    from continual.state.parts import TrialRecord
    from continual.tuning import Tuned

app = typer.Typer(rich_markup_mode=None)


@app.command()
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Evaluate and print, and record nothing.")] = False,
    base: BaseDir = None,
    device: Device = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Find how large the merged task vector should be, by evaluating candidates, and record it. Nothing is folded
    again."""
    from continual import tuning
    from continual.cli import console
    from continual.errors import Misconfigured

    if (command is None) == (rows is None) or (rows is None) != (objective is None):
        raise Misconfigured(
            "say what a candidate is worth: with --command 'eval.py {model}', or with --rows FILE --objective NAME"
        )
    evaluation: tuning.Evaluation
    if command is not None:
        if heads is not None:
            raise Misconfigured("--heads goes with --rows")
        evaluation = tuning.Command(tuning.Command.split(command), key, lower, timeout)
    else:
        if key is not None or lower or timeout is not None:
            raise Misconfigured("--key, --lower and --timeout go with --command")
        assert rows is not None
        evaluation = tuning.Rows(str(objective), rows, heads, batch)
    asked = tuning.Tuning(candidates, cast("Policy | None", policy), around, lines, work, dry_run)
    signal.signal(signal.SIGTERM, _stop)
    flags = {"base": base, "device": device, "workers": workers, "memory": memory, "state": state}
    with opened.merge(config, write=not dry_run, **flags) as merge, console.progress() as progress:
        tuned = merge.tune(evaluation, asked, progress, None if json else _told)
    if json:
        console.emit(
            {
                "read": tuned.read.to_mapping(),
                "record": tuned.commit and tuned.commit.seq,
                "score": tuned.score,
                **tuned.entry.own(),
            }
        )
    else:
        _print(tuned)


def _told(options: ReadOptions, score: float) -> None:
    from continual.cli import console

    console.warn(f"scale {options}: {score:.6g}")


def _print(tuned: Tuned) -> None:
    from continual.cli import console

    chosen = (tuned.read.scale, tuned.read.lines or None)
    rows = [
        (t.scale, _lines(t.lines), f"{t.score:.6g}", _mark(t, chosen, tuned.entry.before)) for t in tuned.entry.trials
    ]
    console.table(("scale", "lines", "score", ""), rows)
    told = f"scale {tuned.read}: {tuned.score:.6g}, against {tuned.before:.6g} at what was in force; {len(rows)} candidates in {tuned.entry.seconds:.1f} s"
    console.say(f"{told}; {f'recorded as record {tuned.commit.seq}' if tuned.commit else 'nothing recorded'}")


def _mark(trial: TrialRecord, chosen: tuple[str, tuple[float, float] | None], before: TrialRecord) -> str:
    marks = ("in force" * (trial == before), "chosen" * ((trial.scale, trial.lines) == chosen))
    return ", ".join(mark for mark in marks if mark)


def _lines(lines: tuple[float, float] | None) -> str:
    return f"{lines[0]:g}:{lines[1]:g}" if lines else ""


def _stop(_number: int, _frame: object) -> NoReturn:
    """A termination ends like an interrupt: the command under way is stopped and the scratch file removed."""
    raise SystemExit(128 + signal.SIGTERM)
