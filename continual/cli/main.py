"""The `continual` command: making a state, folding, exporting, the daemon. A command takes its flags, calls the API and
prints; heavy imports happen inside the commands, so that help and completion stay quick."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from continual import texts
from continual.cli import answered, configuring, console, doctoring, ending, importing, opened, planned
from continual.cli import control as cli_control
from continual.cli import history as cli_history
from continual.cli import hub as cli_hub
from continual.cli import outputs as cli_outputs
from continual.cli import pool as cli_pool
from continual.cli import quarantine as cli_quarantine
from continual.cli import state as cli_state
from continual.cli import tune as cli_tune
from continual.cli import upkeep as cli_upkeep
from continual.cli.flags import (
    GATES,
    MACHINE,
    OPENING,
    ROUNDS,
    SOURCES,
    Flags,
    Json,
    Lines,
    rules_named,
    takes,
)
from continual.cli.profiling import Profiled, profiled, spending, with_more
from continual.cli.profiling import told as profile_told
from continual.cli.typed import parse_options
from continual.errors import Misconfigured
from continual.stores import on_disk

if TYPE_CHECKING:
    from continual.hub import Hub

app = typer.Typer(
    name="continual",
    help="Keep one merged model up to date: every new fine-tune of a base is folded in as it appears.",
    epilog=ending.TEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_state.app)
app.add_typer(cli_upkeep.app)
app.add_typer(cli_tune.app)
app.add_typer(cli_outputs.app)
app.add_typer(cli_history.app)
app.add_typer(planned.app)
app.add_typer(cli_pool.app)
app.add_typer(cli_quarantine.app)
app.add_typer(cli_hub.app)
app.add_typer(cli_control.app)
app.add_typer(configuring.app)
app.add_typer(doctoring.app)
app.add_typer(importing.app)


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
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error, too.")] = False,
) -> None:
    if debug:
        os.environ["CONTINUAL_DEBUG"] = "1"


@app.command()
@takes("tied", *OPENING)
def init(
    base: Annotated[
        str, typer.Argument(help="Directory of the base model (safetensors), or a repo of the Hub: ORG/NAME@REVISION.")
    ],
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="Fold rule, default tsv-flow, with --adapters tsv-even; 'continual rules' lists them.",
            show_default=False,
            autocompletion=rules_named,
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
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale", help="Read-time scale: spread:C, norm:KAPPA, a number, auto or paper.", show_default=False
        ),
    ] = None,
    lines: Lines = None,
    plain: Annotated[
        list[str] | None, typer.Option("--plain", help="Glob of tensors that take the rule's plain form; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob of tensors that are carried untouched; repeatable.")
    ] = None,
    adapters: Annotated[
        bool,
        typer.Option("--adapters", help="Keep LoRA adapters as they are; of the base only headers are read."),
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            min=1,
            help="With --adapters: singular triplets kept of a layer, default 256.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the state would hold and make nothing.")
    ] = False,
    *,
    flags: Flags,
) -> None:
    """Make a state for a base model."""
    from continual import making

    settings = opened.settings(flags)
    if width is not None and not adapters:
        raise Misconfigured("--width is for a state of adapters: add --adapters")
    chosen = making.recipe_for(settings, rule=rule, options=parse_options(option or []), before=before)
    recipe = dataclasses.replace(
        chosen, scale=scale, lines=lines, plain=tuple(plain or ()), exclude=tuple(exclude or ())
    )
    if adapters:
        recipe = dataclasses.replace(recipe, width=width or making.WIDTH)
    if dry_run:
        found = making.survey(base, recipe, client=flags.client)
    else:
        with console.progress() as progress:
            found = making.init(base, settings.state, recipe, progress=progress, client=flags.client)
    if flags.json:
        console.emit(found)
        return
    console.say(
        f"{'Would make' if dry_run else 'Made'} a state for {found.base} under {settings.state}: "
        f"rule {found.rule}, scale {found.scale}"
    )
    console.table(("kind", "tensors", "parameters"), found.kinds)
    if found.width is None:
        console.say(f"Each generation takes {texts.size(found.state_bytes)} on disk.")
    else:
        console.say(
            f"Keeps adapters as they are, at most {found.width} singular triplets a layer: a generation takes what the "
            f"adapters take, at most {texts.size(found.state_bytes)}."
        )
    if found.packed is not None:
        console.say(
            f"The base is quantised ({found.packed}): adapters are folded and exported; a whole model takes --base of "
            "the model that it was quantised from."
        )
    if not dry_run:
        console.say("Next: continual run --watch FOLDER, or continual fold MODEL")


@app.command()
def rules(
    name: Annotated[
        str | None,
        typer.Argument(help="Of one alone, and all of it.", show_default=False, autocompletion=rules_named),
    ] = None,
    json: Json = False,
) -> None:
    """List the fold rules and the transforms before them: what each is, what its state takes, and what it allows."""
    from continual.rules import catalogue

    rules, transforms = catalogue.rules(), catalogue.transforms()
    if name is not None:
        rules, transforms = [r for r in rules if r.name == name], [t for t in transforms if t.name == name]
        if not rules and not transforms:
            raise Misconfigured(f"{name}: no rule of that name; continual rules lists them")
    if json:
        console.emit({"rules": rules, "transforms": transforms})
    elif name is not None:
        for row in rules or transforms:
            console.rule(row)
    else:
        console.rules(rules, transforms)


@app.command()
@takes(
    "watch",
    "settle",
    "rescan",
    "nested",
    "host",
    "port",
    "current",
    "tokenizer",
    "keep",
    "keep_bytes",
    "drain",
    *SOURCES,
    "release",
    *ROUNDS,
    *GATES,
    *MACHINE,
    "state",
    "config",
    "log_file",
    "log_json",
    "log_level",
    "allow_remote",
    "allowed_hosts",
)
def run(*, flags: Flags) -> None:
    """Run the daemon: watch folders and the Hub, fold what appears, publish the merge, serve the status page and
    metrics."""
    gc.disable()  # until the daemon stands: looking again and again through what is loaded took a tenth of the start
    from continual.service import daemon

    raise typer.Exit(daemon.run(opened.settings(flags), lambda: opened.settings(flags)))


@app.command()
@takes("keep", "keep_bytes", *ROUNDS, *GATES, *MACHINE, *OPENING)
def fold(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Directories of fine-tunes or adapters, or repos (hf://ORG/NAME@REVISION), folded in this order."
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as 'plan'.")] = False,
    profile: Profiled = False,
    *,
    flags: Flags,
) -> None:
    """Fold models now. One that is in the state already is left alone; a refused one does not stop the rest.

    Where rounds choose (--select, or a state of the rule frank-wolfe) the models join those that wait, and a round is
    run over them.
    """
    if dry_run:
        planned.plans(models, flags)
    outcomes, found = [], None
    with profiled(profile) as taken, opened.merge(flags, write=True) as merge:
        merge.check(models)  # a mistyped one is told of before any is folded, and so is what rounds lack
        if merge.selects != "none":
            console.caution(merge.asked().settings.unsupervised)
        for model in models:
            with console.progress() as progress:
                outcome = merge.fold(model, progress=progress)
            outcomes.append(outcome)
            if not flags.json:
                console.outcome(outcome)
        if merge.selects != "none" and merge.pool():
            with console.progress() as progress:
                found = merge.round(progress, None if flags.json else console.heard)
    if found is not None:
        from continual.service.control.acting import round_body

        judged = round_body(found)
    spent = spending(taken, merge)
    if flags.json:
        told = [outcome.summary() for outcome in outcomes]
        if found is None and spent is None:
            console.emit(told)
        else:
            console.emit(with_more({"models": told} | ({} if found is None else {"round": judged}), "profile", spent))
    elif found is not None:
        answered.round_told(judged)
    if not flags.json:
        profile_told(spent)
    refused = any(outcome.refused for outcome in outcomes) or (found is not None and found.refused)
    raise typer.Exit(1 if refused else 0)


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to work; default: a temporary directory.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of data, training and order.")] = 0,
    json: Json = False,
) -> None:
    """Train a small model and fine-tunes of it, let a real daemon fold them, kill it half-way; show what it kept."""
    from rich.console import Console

    from continual.demo import story

    if directory is not None:
        on_disk(directory)
    result = story.run(directory, json=json, seed=seed, console=Console(stderr=json, highlight=False))
    if json:
        console.emit(result)


def _alone(words: Sequence[str]) -> typer.Typer:
    """The app with that command alone that `words` begin with, else all of it: typer makes every flag of each command
    that it has, which takes as long as folding a small adapter."""
    parts = (app, *(group.typer_instance for group in app.registered_groups))
    for command in (command for part in parts if part is not None for command in part.registered_commands):
        assert command.callback is not None
        if words[:1] == [command.name or command.callback.__name__]:
            found = copy.copy(app)
            found.registered_groups, found.registered_commands = [], [command]
            return found
    return app


def main(client: Hub | None = None) -> None:
    """Entry point: whatever goes wrong becomes one line on standard error and an exit code, see `ending`. `client` is
    asked in place of the Hub that the environment names."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    ending.prepare()
    gc.freeze()  # what is loaded stays: the collector looked through all of it again and again
    try:
        try:
            _alone(sys.argv[1:])(obj=client)
        finally:
            ending.flush()  # what cannot be written is told of here, and not while the process ends
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # typer makes a plain exit of it
            _end(left.__context__)
        if left.code == ending.INTERRUPTED:
            _end(KeyboardInterrupt())
        raise
    except BaseException as error:
        _end(error)


def _end(error: BaseException) -> NoReturn:
    ending.trace(error)
    code, line = ending.of(error)
    ending.drop_output()
    if line is not None:
        console.warn(f"continual: {texts.plain(line)}")
    raise SystemExit(code) from None
