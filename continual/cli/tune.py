"""The command that chooses how the merge is read, by what candidates are worth."""

from __future__ import annotations

import signal
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, cast

import typer

from continual.cli import console, opened
from continual.cli.flags import MACHINE, OPENING, Flags, takes
from continual.cli.typed import Worth, parse_options
from continual.errors import Misconfigured
from continual.outside import counted
from continual.texts import size

if TYPE_CHECKING:
    from continual.rules import ReadOptions
    from continual.rules.scale import Policy
    from continual.tuning import Evaluation, Learning, TaskRows, Weighing

app = typer.Typer(rich_markup_mode=None)
What = Literal["scale", "weights", "layers", "models-layers", "inputs"]
LEARNED = ("layers", "models-layers")


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
    what: Annotated[
        What,
        typer.Option(
            "--what",
            help="What to find: scale, weights (of the models of a state of adapters), layers (a coefficient each), "
            "models-layers (one for each model in each layer), or inputs (of layers, on rows of each task; for the "
            "rule regmean).",
        ),
    ] = "scale",
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            "--rows",
            help="Calibration rows: a JSONL file with text and label; for layers, models-layers and inputs one a task.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="Of the rows: causal-lm, classification or heads; for layers, models-layers and inputs also "
            "module:function.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        list[Path] | None,
        typer.Option(
            "--heads",
            help="Prompts of each label (JSON), for the objective heads; one for each --rows.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help="With layers, models-layers and inputs: how rows are run, as seed=1, held=0.2, dtype=bfloat16, "
            "unsupervised=true.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            help="With layers and models-layers: a model for each --rows, which says what is right in place of labels.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            help="With layers and models-layers, for causal-lm: texts (JSONL) of which what the model predicts must "
            "stay; default: the prompts of rows, where there are any.",
            show_default=False,
        ),
    ] = None,
    drift: Annotated[
        float | None,
        typer.Option(
            "--drift",
            help="With layers and models-layers: how far what is predicted of these texts may go, in nats a token "
            "(0.02); inf: nothing has to stay.",
            show_default=False,
        ),
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
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            help="With weights: models that share a factor, as NAME,NAME or a glob; default: one each; repeatable.",
        ),
    ] = None,
    whose: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help="With inputs: the models of each file of rows, or task, as NAME,NAME or a glob; once for each.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="With inputs: eigenvalues that are kept of a layer; default: 64.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Evaluate and print, and record nothing.")] = False,
    *,
    flags: Flags,
) -> None:
    """Find how large the merged task vector should be, or how much each model weighs in it, or each of its layers, or
    each model in each layer, by evaluating candidates, and record it; or read what layers are given on rows of each
    task, for rules that read by that. Nothing is folded again."""
    from continual.tuning import Learning, TaskRows, Tuning, Weighing

    worth = Worth(command, rows or (), objective, heads or (), batch, key, lower, timeout)
    if what != "scale" and (policy is not None or around is not None or lines):
        raise Misconfigured(f"--what {what} leaves the scale as it is: leave out --policy, --around and --lines")
    if group and what != "weights":
        raise Misconfigured("--group is for --what weights")
    if calibration and what not in (*LEARNED, "inputs"):
        raise Misconfigured("--calibration is for --what layers, --what models-layers and --what inputs")
    if (whose or rank is not None) and what != "inputs":
        raise Misconfigured("--for and --rank are for --what inputs")
    if teacher and what not in LEARNED:
        raise Misconfigured("--teacher is for --what layers and --what models-layers")
    if (keep is not None or drift is not None) and what not in LEARNED:
        raise Misconfigured("--keep and --drift are for --what layers and --what models-layers")
    signal.signal(signal.SIGTERM, _stop)
    if what == "inputs":
        if rule is not None:
            raise Misconfigured("--what inputs leaves the rule as it is: then 'continual scale --rule regmean'")
        name, files, prompts = worth.run_on()
        models = tuple(tuple(words.split(",")) for words in whose or ())
        more = {} if rank is None else {"rank": rank}
        asked = parse_options(calibration or ())
        return _inputs(TaskRows(name, models, files, prompts, calibration=asked, dry_run=dry_run, **more), flags)
    if what in LEARNED:
        name, files, prompts = worth.learned()
        settings = {"batch": batch, **parse_options(calibration or ())}
        teachers, each = tuple(teacher or ()), what == "models-layers"
        wish = Learning(name, files, prompts, settings, candidates, work, dry_run, rule, teachers, each, keep)
        return _learn(wish if drift is None else replace(wish, drift=drift), flags)
    evaluation = worth.evaluation()
    if what == "weights":
        groups = tuple(tuple(words.split(",")) for words in group or ())
        return _weigh(evaluation, Weighing(candidates, groups, work, dry_run, rule), flags)
    wanted = Tuning(candidates, cast("Policy | None", policy), around, lines, work, dry_run, rule)
    with opened.merge(flags, write=not dry_run) as merge, console.progress() as progress:
        tuned = merge.tune(evaluation, wanted, progress, None if flags.json else console.trial)
    if flags.json:
        console.emit(console.tuned_body(tuned))
    else:
        console.tuned(tuned)


def _learn(wanted: Learning, flags: Flags) -> None:
    """Finds the coefficients of the layers, or of each model in them."""
    if wanted.asked().settings.unsupervised:
        console.warn(
            "unsupervised: entropy says how sure the model is, not whether it is right: look at the tuned model before "
            "you use it"
        )

    def told(_options: ReadOptions, score: float) -> None:
        console.warn(f"loss of the rows that judge: {-score:.6g}")

    with opened.merge(flags, write=not wanted.dry_run) as merge, console.progress() as progress:
        tuned = merge.tune_layers(wanted, progress, None if flags.json else told)
    if flags.json:
        console.emit(console.tuned_body(tuned))
        return
    console.learned(tuned)
    if wanted.objective == "causal-lm" and tuned.entry.drift is None and isfinite(wanted.drift):
        console.warn("the rows have no prompts, so nothing says what must stay: name texts with --keep")
    if tuned.score == tuned.before:
        return console.say(
            f"no candidate {console.within(tuned)}served the rows that judge better than what is in force: nothing is "
            "recorded"
        )
    console.say(console.tuned_line(tuned, loss=True))


def _inputs(wanted: TaskRows, flags: Flags) -> None:
    """Reads the inputs of layers."""
    with opened.merge(flags, write=not wanted.dry_run) as merge, console.progress() as progress:
        found = merge.read_inputs(wanted, progress)
    names = ("models", "rows", "vectors", "bytes")
    if flags.json:
        tasks = [dict(zip(names, task, strict=True)) for task in found.tasks]
        record = None if found.commit is None else found.commit.seq
        more = {"rank": found.rank, "layers": found.layers, "lacking": list(found.lacking)}
        return console.emit({"record": record, "tasks": tasks, **more, "seconds": round(found.seconds, 3)})
    table = [(",".join(models), str(rows), str(vectors), size(nbytes)) for models, rows, vectors, nbytes in found.tasks]
    console.table(("models", "rows", "inputs of a layer", "bytes"), table)
    if found.lacking:
        console.say(
            f"{counted(len(found.lacking), 'layer')} of the state (as {found.lacking[0]}) lie in no linear layer of "
            "the class that ran the rows: a rule that reads by inputs reads them as the mean"
        )
    recorded = f"recorded as record {found.commit.seq}" if found.commit else "nothing recorded"
    console.say(
        f"inputs of {counted(found.layers, 'layer')}, {found.rank} eigenvalues of each, "
        f"in {found.seconds:.1f} s; {recorded}"
    )


def _weigh(evaluation: Evaluation, wanted: Weighing, flags: Flags) -> None:
    """Finds the weights of the models."""
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
