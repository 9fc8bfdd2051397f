"""The `continual` command. No logic: each command parses, calls `continual.api` and prints. Heavy imports happen inside
the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from continual import texts
from continual.cli import hub as cli_hub
from continual.cli import opened
from continual.cli import pool as cli_pool
from continual.cli import state as cli_state
from continual.cli import tune as cli_tune
from continual.cli.flags import (
    BaseDir,
    Config,
    Device,
    Heads,
    HubFlags,
    Json,
    Lines,
    MaxBase,
    Memory,
    Missing,
    Objective,
    ReleaseFlags,
    Rounds,
    Rows,
    Scale,
    Select,
    SourceFlags,
    StateDir,
    Updates,
    Vocab,
    Weight,
    Workers,
)

if TYPE_CHECKING:
    pass

EXIT = """Exit codes: 0 done; 1 a model was refused; 2 wrong usage or settings; 3 the environment got in the way, nothing was settled, try again;
4 the state or base is damaged or going on would be wrong; 5 another process is writing to the state."""

app = typer.Typer(
    name="continual",
    help="Keep one merged model up to date: every new fine-tune of a base is folded in as it appears.",
    epilog=EXIT,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_state.app)
app.add_typer(cli_tune.app)
app.add_typer(cli_pool.app)
app.add_typer(cli_hub.app)


def _rules(incomplete: str) -> list[tuple[str, str]]:
    from continual.rules import ROWS

    return [(row.name, row.summary) for row in ROWS.values() if row.name.startswith(incomplete)]


def _transforms(incomplete: str) -> list[tuple[str, str]]:
    from continual.rules import TRANSFORMS

    return [(row.name, row.summary) for row in TRANSFORMS.values() if row.name.startswith(incomplete)]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"continual {version('continual')}")
        raise typer.Exit


@app.callback()
def _top(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    base: Annotated[
        str, typer.Argument(help="Directory of the base model (safetensors), or a repo of the Hub: ORG/NAME@REVISION.")
    ],
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="Fold rule, default iso-c; 'continual rules' lists them.",
            show_default=False,
            autocompletion=_rules,
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Fold-time option of the rule as key=value; repeatable.")
    ] = None,
    before: Annotated[
        list[str] | None,
        typer.Option(
            "--before",
            help="Transform before each fold, as drop:rate=0.9; repeatable, in order.",
            autocompletion=_transforms,
        ),
    ] = None,
    scale: Scale = None,
    lines: Lines = None,
    plain: Annotated[
        list[str] | None, typer.Option("--plain", help="Glob of tensors that take the rule's plain form; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob of tensors that are carried untouched; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the state would hold and make nothing.")
    ] = False,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a state for a base model."""
    import dataclasses

    from continual import making
    from continual.cli import console
    from continual.cli.options import parse_options

    settings = opened.settings(config, state=state)
    chosen = making.recipe_for(settings, rule=rule, options=parse_options(option or []), before=before)
    recipe = dataclasses.replace(
        chosen, scale=scale, lines=lines, plain=tuple(plain or ()), exclude=tuple(exclude or ())
    )
    with console.progress() as progress:
        summary = (
            making.survey(base, recipe) if dry_run else making.init(base, settings.state, recipe, progress=progress)
        )
    if json:
        console.emit(summary)
        return
    console.say(
        f"{'Would make' if dry_run else 'Made'} a state for {summary.base} under {settings.state}: rule {summary.rule}, scale {summary.scale}"
    )
    console.table(("kind", "tensors", "parameters"), summary.kinds)
    console.say(f"Each generation takes {texts.size(summary.state_bytes)} on disk.")
    if not dry_run:
        console.say("Next: continual run --watch FOLDER, or continual fold MODEL")


@app.command()
def rules(json: Json = False) -> None:
    """List the fold rules and the transforms before them: what each is, what its state takes, and what it allows."""
    from continual.cli import console
    from continual.rules import catalogue

    rules, transforms = catalogue.rules(), catalogue.transforms()
    if json:
        console.emit({"rules": rules, "transforms": transforms})
        return
    console.table(console.RULES_HEAD, [console.rule_row(r) for r in rules])
    console.say("")
    console.table(
        ("before", "options", "what, and where from"),
        [(t.name, console.options(t.options), f"{t.summary} ({t.paper})") for t in transforms],
    )


@app.command()
def run(
    watch: Annotated[
        list[Path] | None, typer.Option("--watch", help="Folder in which fine-tunes are published; repeatable.")
    ] = None,
    settle: Annotated[
        float | None, typer.Option("--settle", help="Seconds a model's files must be still.", show_default=False)
    ] = None,
    rescan: Annotated[
        float | None, typer.Option("--rescan", help="Seconds between full scans.", show_default=False)
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on (loopback).", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port of the service; 0 takes a free one.", show_default=False)
    ] = None,
    current: Annotated[
        Path | None, typer.Option("--current", help="Link kept on an export of the newest merge.", show_default=False)
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", help="Generations kept besides tagged ones.", show_default=False)
    ] = None,
    drain: Annotated[
        float | None, typer.Option("--drain", help="Seconds a stop waits for the fold under way.", show_default=False)
    ] = None,
    hub: HubFlags = None,
    sources: SourceFlags = None,
    release: ReleaseFlags = None,
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
    log_json: Annotated[
        bool | None, typer.Option("--log-json/--log-text", help="Form of the log lines.", show_default=False)
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="debug, info, warning or error.", show_default=False)
    ] = None,
    allow_remote: Annotated[
        bool | None, typer.Option("--allow-remote", help="Listen beyond loopback.", show_default=False)
    ] = None,
) -> None:
    """Run the daemon: watch folders and the Hub, fold what appears, publish the merge, serve the status page and
    metrics."""
    flags = {k: v for k, v in locals().items() if k != "config"}
    from continual.service import daemon

    raise typer.Exit(daemon.run(opened.settings(config, **flags)))


@app.command()
def fold(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Directories of fine-tunes or adapters, or repos (hf://ORG/NAME@REVISION), folded in this order."
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as 'plan'.")] = False,
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
    """Fold models now. One that is in the state already is left alone; a refused one does not stop the rest.

    Where rounds choose (--select, or a state of the rule frank-wolfe) the models join those that wait, and a round is
    run over them.
    """
    skipped = ("models", "dry_run", "config", "json")
    flags = {k: v for k, v in locals().items() if k not in skipped and k != "skipped"}
    if dry_run:
        _plan(models, config, flags, json)
    from continual.cli import console

    outcomes = []
    with opened.merge(config, write=True, **flags) as merge:
        for model in models:
            merge.places.named(model)  # a mistyped one is told of before any is folded
        if merge.selects != "none":
            asked = merge.asked()
            asked.calibration.told()
            console.caution(asked)  # before anything waits: what is missing is said at once
        for model in models:
            with console.progress() as progress:
                outcome = merge.fold(model, progress=progress)
            outcomes.append(outcome)
            if not json:
                (console.warn if outcome.refused else console.say)(outcome.line())
        found = None
        if merge.selects != "none" and merge.pool():
            with console.progress() as progress:
                found = merge.round(progress, None if json else console.heard)
    if json:
        told = [outcome.summary() for outcome in outcomes]
        console.emit(told if found is None else {"models": told, "round": console.round_body(found)})
    elif found is not None:
        console.round_told(found)
    raise typer.Exit(1 if any(outcome.refused for outcome in outcomes) or (found and found.refused) else 0)


@app.command()
def plan(
    models: Annotated[
        list[str], typer.Argument(help="Directories of fine-tunes or adapters, or repos (hf://ORG/NAME@REVISION).")
    ],
    updates: Updates = None,
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
    """Say from headers alone what folding models would take, and whether they would be let in."""
    flags = {k: v for k, v in locals().items() if k not in ("models", "config", "json")}
    _plan(models, config, flags, json)


def _plan(models: list[str], config: Path | None, flags: dict[str, Any], json: bool) -> NoReturn:
    from continual.cli import console

    with opened.merge(config, **flags) as merge:
        plans = [merge.plan(model) for model in models]
    console.emit(plans) if json else console.plans(plans)
    raise typer.Exit(0 if all(p.ok or p.reason == "known" for p in plans) else 1)


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    at: Annotated[
        int | None, typer.Option("--at", help="Record to export; default: the newest.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16; default: the base's.", show_default=False),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="Largest shard, as 5GB; default: the base's.", show_default=False)
    ] = None,
    as_lora: Annotated[
        int | None,
        typer.Option(
            "--as-lora", help="Write a LoRA adapter (PEFT) of this rank, as near as one comes.", show_default=False
        ),
    ] = None,
    base: BaseDir = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write the merged model as an ordinary model directory, or as a LoRA adapter."""
    from continual.cli import console
    from continual.publish import folder

    if as_lora is not None:
        word = folder.parse_dtype(dtype) or "F32"
        with (
            opened.merge(config, state=state, base=base, workers=workers, memory=memory) as merge,
            console.progress() as progress,
        ):
            report = merge.export_lora(directory, as_lora, at=at, dtype=word, progress=progress)
        console.emit(report) if json else console.lora(report)
        return
    target = folder.Target(directory, at, folder.parse_dtype(dtype), folder.parse_size(shard_size))
    with (
        opened.merge(config, state=state, base=base, workers=workers, memory=memory) as merge,
        console.progress() as progress,
    ):
        path = merge.export(target, progress)
    console.emit({"directory": path}) if json else console.say(f"Wrote {path}")


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to work; default: a temporary directory.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of data, training and order.")] = 0,
    json: Json = False,
) -> None:
    """Train a small model and fine-tunes of it, let a real daemon fold them, kill it half-way, and show what it kept."""
    from rich.console import Console

    from continual.cli import console
    from continual.demo import story

    result = story.run(directory, json=json, seed=seed, console=Console(stderr=json, highlight=False))
    if json:
        console.emit(result)


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    from continual.errors import Busy, ContinualError, Misconfigured, Refuse, Retry

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except ContinualError as error:
        sys.stderr.write(f"continual: {error}\n")
        codes = ((Busy, 5), (Misconfigured, 2), (Refuse, 1), (Retry, 3))
        raise SystemExit(next((code for kind, code in codes if isinstance(error, kind)), 4)) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
