"""The `continual` command. No logic: each command parses, calls `continual.api` and prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from continual.flags import BaseDir, Config, Device, Json, MaxBase, Memory, Missing, StateDir, Updates, Vocab, Workers

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.config import Settings

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


def _settings(config: Path | None, **flags: Any) -> Settings:
    from continual.config import load

    return load(flags, file=config)


@contextlib.contextmanager
def _merge(config: Path | None, write: bool = False, **flags: Any) -> Iterator[Merge]:
    from continual.api import Merge

    with Merge(_settings(config, **flags), write=write) as merge:
        yield merge


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"continual {version('continual')}")
        raise typer.Exit


@app.callback()
def _top(_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def init(
    base: Annotated[Path, typer.Argument(help="Directory of the base model (safetensors).")],
    rule: Annotated[str, typer.Option("--rule", help="Fold rule; 'continual rules' lists them.")] = "opcm",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Fold-time option of the rule as key=value; repeatable.")
    ] = None,
    scale: Annotated[str | None, typer.Option("--scale", help="Read-time scale: norm, norm:KAPPA or a number.", show_default=False)] = None,
    plain: Annotated[list[str] | None, typer.Option("--plain", help="Glob of tensors that take the rule's plain form; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Glob of tensors that are carried untouched; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the state would hold and make nothing.")] = False,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a state for a base model."""
    from continual import api, console

    settings = _settings(config, state=state)
    asked = api.Asked(rule, api.parse_options(option or []), scale, tuple(plain or ()), tuple(exclude or ()))
    with console.progress() as progress:
        summary = api.survey(base, asked) if dry_run else api.init(base, settings.state, asked, progress=progress)
    if json:
        console.emit(summary)
        return
    console.say(
        f"{'Would make' if dry_run else 'Made'} a state for {summary.base} under {settings.state}: rule {rule}, scale {summary.scale}"
    )
    console.table(("kind", "tensors", "parameters"), summary.kinds)
    console.say(f"Each generation takes {console.size(summary.state_bytes)} on disk.")
    if not dry_run:
        console.say("Next: continual run --watch FOLDER, or continual fold MODEL")


@app.command()
def rules(json: Json = False) -> None:
    """List the fold rules: what each is, what its state takes, and what it allows."""
    from continual import console
    from continual.api import rules

    found = rules()
    if json:
        console.emit(found)
        return
    head = ("rule", "bytes per parameter", "order-free", "unfold", "default scale", "options", "what, and where from")
    yes = {True: "yes", False: "no"}
    console.table(
        head,
        [
            (r.name, r.bytes_per_parameter, yes[r.order_free], yes[r.group], r.scale, ", ".join(r.options), f"{r.summary} ({r.paper})")
            for r in found
        ],
    )


@app.command()
def run(
    watch: Annotated[list[Path] | None, typer.Option("--watch", help="Folder in which fine-tunes are published; repeatable.")] = None,
    settle: Annotated[float | None, typer.Option("--settle", help="Seconds a model's files must be still.", show_default=False)] = None,
    rescan: Annotated[float | None, typer.Option("--rescan", help="Seconds between full scans.", show_default=False)] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on (loopback).", show_default=False)] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the service; 0 takes a free one.", show_default=False)] = None,
    current: Annotated[
        Path | None, typer.Option("--current", help="Link kept on an export of the newest merge.", show_default=False)
    ] = None,
    keep: Annotated[int | None, typer.Option("--keep", help="Generations kept besides tagged ones.", show_default=False)] = None,
    drain: Annotated[float | None, typer.Option("--drain", help="Seconds a stop waits for the fold under way.", show_default=False)] = None,
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
    log_json: Annotated[bool | None, typer.Option("--log-json/--log-text", help="Form of the log lines.", show_default=False)] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.", show_default=False)] = None,
    allow_remote: Annotated[bool | None, typer.Option("--allow-remote", help="Listen beyond loopback.", show_default=False)] = None,
) -> None:
    """Run the daemon: watch folders, fold what appears, serve the status page and metrics."""
    flags = {k: v for k, v in locals().items() if k != "config"}
    from continual import daemon

    raise typer.Exit(daemon.run(_settings(config, **flags)))


@app.command()
def fold(
    models: Annotated[list[Path], typer.Argument(help="Directories of fine-tunes or adapters, folded in this order.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as 'plan'.")] = False,
    keep: Annotated[int | None, typer.Option("--keep", help="Generations kept besides tagged ones.", show_default=False)] = None,
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
    """Fold models now. One that is in the state already is left alone; a refused one does not stop the rest."""
    skipped = ("models", "dry_run", "config", "json")
    flags = {k: v for k, v in locals().items() if k not in skipped and k != "skipped"}
    if dry_run:
        _plan(models, config, flags, json)
    from continual import api, console

    for model in models:
        api.existing(model)
    outcomes = []
    with _merge(config, write=True, **flags) as merge:
        for model in models:
            with console.progress() as progress:
                outcome = merge.fold(model, progress=progress)
            outcomes.append(outcome)
            if not json:
                (console.warn if outcome.refused else console.say)(outcome.line())
    if json:
        console.emit([outcome.summary() for outcome in outcomes])
    raise typer.Exit(1 if any(outcome.refused for outcome in outcomes) else 0)


@app.command()
def plan(
    models: Annotated[list[Path], typer.Argument(help="Directories of fine-tunes or adapters.")],
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


def _plan(models: list[Path], config: Path | None, flags: dict[str, Any], json: bool) -> NoReturn:
    from continual import console

    with _merge(config, **flags) as merge:
        plans = [merge.plan(model) for model in models]
    console.emit(plans) if json else console.plans(plans)
    raise typer.Exit(0 if all(p.ok or p.reason == "known" for p in plans) else 1)


@app.command()
def status(state: StateDir = None, config: Config = None, json: Json = False) -> None:
    """Show health, queue and last folds: the running daemon's answer, else what the state says."""
    from continual import console, status

    settings = _settings(config, state=state)
    body = status.ask(settings.state) or status.at_rest(settings)
    console.emit(body) if json else console.say(status.text(body))


@app.command()
def log(
    number: Annotated[int, typer.Option("--number", "-n", min=0, help="Newest records to show; 0 shows all.")] = 20,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """List what happened, newest last: the ledger of every candidate ever seen."""
    from continual import console

    with _merge(config, state=state) as merge:
        commits = list(merge.state.log)[-number:]
    if json:
        console.emit([console.record(c) for c in commits])
    else:
        console.table(console.LOG_HEAD, [console.log_row(c) for c in commits])


@app.command()
def show(
    seq: Annotated[int, typer.Argument(help="Record number.")], state: StateDir = None, config: Config = None, json: Json = False
) -> None:
    """Show one record whole."""
    from continual import console

    with _merge(config, state=state) as merge:
        body = console.record(merge.state.get(seq))
    if json:
        console.emit(body)
    else:
        console.table(("field", "value"), [(k, v) for k, v in body.items() if v is not None])


@app.command()
def tag(
    name: Annotated[str | None, typer.Argument(help="Name to give; without one the tags are listed.")] = None,
    seq: Annotated[int | None, typer.Option("--at", help="Record number; default: the newest.", show_default=False)] = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Name a record, so that its generation is kept for good; or list the names."""
    from continual import console

    with _merge(config, write=name is not None, state=state) as merge:
        if name is not None:
            merge.state.tag(name, seq)
        tags = merge.state.tags()
    if json:
        console.emit(tags)
    else:
        console.table(("tag", "seq"), sorted(tags.items()))


@app.command()
def rollback(
    seq: Annotated[int, typer.Argument(help="Record to go back to.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be undone and change nothing.")] = False,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Go back to the merge of an earlier record. The folds after it come back only by 'retry'."""
    from continual import console

    with _merge(config, write=not dry_run, state=state) as merge:
        kept = {fold.seq for fold in merge.state.folds(at=seq)}
        undone = [fold for fold in merge.state.folds() if fold.seq not in kept]
        commit = None if dry_run else merge.state.rollback(seq)
    if json:
        console.emit({"to": seq, "record": commit and commit.seq, "undone": [console.record(c) for c in undone]})
        return
    console.say(f"{'Would go' if dry_run else 'Went'} back to record {seq}; {len(undone)} folds undone")
    if undone:
        console.table(console.LOG_HEAD, [console.log_row(c) for c in undone])


@app.command()
def retry(
    model: Annotated[str, typer.Argument(help="Name, path, key or record number of a refused or rolled-back candidate.")],
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Have a refused or rolled-back candidate looked at again."""
    from continual import console

    with _merge(config, write=True, state=state) as merge:
        commits = merge.retry(model)
    if json:
        console.emit([console.record(c) for c in commits])
        return
    for commit in commits:
        console.say(f"{(commit.entry.candidate or {})['name']}: will be looked at again by 'run' or 'fold'")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    at: Annotated[int | None, typer.Option("--at", help="Record to export; default: the newest.", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: the base's.", show_default=False)
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="Largest shard, as 5GB; default: the base's.", show_default=False)
    ] = None,
    base: BaseDir = None,
    workers: Workers = None,
    memory: Memory = None,
    state: StateDir = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write the merged model as an ordinary model directory."""
    from continual import console
    from continual.publish import folder

    target = folder.Target(directory, at, folder.parse_dtype(dtype), folder.parse_size(shard_size))
    with _merge(config, state=state, base=base, workers=workers, memory=memory) as merge, console.progress() as progress:
        path = merge.export(target, progress)
    console.emit({"directory": path}) if json else console.say(f"Wrote {path}")


@app.command()
def verify(state: StateDir = None, config: Config = None, json: Json = False) -> None:
    """Check every byte of the state against its receipt."""
    from continual import console

    with _merge(config, state=state) as merge, console.progress() as progress:
        findings = merge.state.verify(lambda done, total: progress("verify", done, total))
    if json:
        console.emit({"ok": not findings, "findings": findings})
    else:
        for finding in findings:
            console.warn(finding)
        console.say(f"{len(findings)} findings" if findings else "clean: every byte is as it was written")
    raise typer.Exit(4 if findings else 0)


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

    from continual import console
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
