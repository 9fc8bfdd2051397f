"""The flags that several commands share, each declared once, and how a command takes them.

A command names the flags it takes, by group or one by one, and gets what was typed as one record:

    @app.command()
    @takes("keep", *GATES, *MACHINE, *OPENING)
    def fold(models: Models, *, flags: Flags) -> None: ...

The flags stand in its help where `flags` stands in its signature. A flag is called as the setting that it gives a value
to; one that is not typed leaves that setting to the settings file and the environment. What each setting means, and
what values it takes, is the matter of `continual.config`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from continual.stores import on_disk

if TYPE_CHECKING:
    from continual.hub import Hub


@dataclass(frozen=True, slots=True)
class Flags:
    """The shared flags as they were typed: the settings file, whether to print JSON, and the settings by name, None
    where a flag was not typed. `client` is the Hub that `main` was given, None for the one that the environment
    names."""

    config: Path | None
    json: bool
    settings: Mapping[str, object]
    client: Hub | None


def _flag(setting: str, kind: object, help_: str, option: str | None = None) -> inspect.Parameter:
    """A flag for a setting, called `--setting` unless `option` names it."""
    written = option or "--" + setting.replace("_", "-")
    default = typer.Option(None, written, help=help_, show_default=False)
    return inspect.Parameter(setting, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def rules_named(incomplete: str) -> list[tuple[str, str]]:
    """The rules whose names begin so, for completion by Tab."""
    from continual.rules import ROWS

    return [(row.name, row.summary) for row in ROWS.values() if row.name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Lines = Annotated[
    str | None,
    typer.Option(
        "--lines",
        help="Layer scaling at reading, ALPHA:BETA (LiNeS: ALPHA + BETA x depth), or none.",
        show_default=False,
    ),
]
"""A flag of `init` and `scale` that is no setting."""
ReadRule = Annotated[
    str | None,
    typer.Option(
        "--rule", help="Rule to read by; 'continual rules' says which.", show_default=False, autocompletion=rules_named
    ),
]
ReadScale = Annotated[
    str | None,
    typer.Option("--scale", help="Scale to read at, as 'continual scale' takes it.", show_default=False),
]
View = Annotated[
    str | None,
    typer.Option("--view", help="View of the settings file, by its name.", show_default=False),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Read these models alone (names or globs; a state of adapters); repeatable."),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", help="Read without these models (a state of adapters); repeatable."),
]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weight", help="Weight of a model, NAME=W (a state of adapters); repeatable."),
]
RuleOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="Option of the rule that reads, as key=value; repeatable."),
]
"""Flags of what reads the merge by a view, from `ReadRule` on."""
Form = Annotated[
    Literal["peft", "kohya", "diffusers"],
    typer.Option("--format", help="Layout of the adapter; kohya and diffusers are for diffusion models."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before anything is undone or done again.")]
"""A flag of what destroys."""

_TEXT, _NUMBER, _WHOLE, _PATH, _SWITCH = str | None, float | None, int | None, Path | None, bool | None
_TEXTS, _PATHS = list[str] | None, list[Path] | None

_FLAGS = (
    _flag("state", _TEXT, "Directory of the state, or s3://BUCKET/PREFIX; else CONTINUAL_STATE, else ./state."),
    _flag("config", _PATH, "Settings file (TOML); else CONTINUAL_CONFIG."),
    inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    _flag("base", _PATH, "Where the base is now, if it was moved since init."),
    _flag("device", _TEXT, "auto, cpu, cuda or cuda:N."),
    _flag("workers", _WHOLE, "Tensors folded at a time; 0: one per core."),
    _flag("memory", _TEXT, "What the tensors in flight may take, as 4GB."),
    _flag("executor", _TEXT, "Who works on tensors: local, or ray."),
    _flag("ray", _TEXTS, "The Ray cluster, as key=value (address=auto, memory=8GB); repeatable."),
    _flag("keep", _WHOLE, "Generations kept besides tagged ones."),
    _flag("keep_bytes", _TEXT, "What they may take on the disk, as 40GB."),
    _flag("weight", _TEXT, "Weight of the models: a number, FILE.json:KEY or metadata:KEY."),
    _flag("updates", _TEXT, "New files at a place folded before: refuse or add."),
    _flag("missing", _TEXT, "A tensor the fine-tune lacks: refuse or unchanged."),
    _flag("vocab", _TEXT, "Another vocabulary: refuse, common-rows or by-token."),
    _flag("lineage", _TEXT, "An adapter that names another base: name (refuse it) or shapes (they decide)."),
    _flag("tied", _TEXT, "A change of one of two tied tables: refuse, both or untie."),
    _flag("max_base_ratio", _NUMBER, "Largest task-vector norm, times the base's norm."),
    _flag("max_mean_ratio", _NUMBER, "Largest task-vector norm, times the median of those in the merge."),
    _flag("gates", _TEXTS, "Setting of one gate, as NAME.KEY=VALUE; repeatable.", "--gate"),
    _flag("select", _TEXT, "Let models wait for rounds that choose: none, relevance or frank-wolfe."),
    _flag("objective", _TEXT, "What is good: causal-lm, classification, heads or module:function."),
    _flag("rows", _PATHS, "Calibration rows of a task (JSONL); repeatable."),
    _flag("heads", _PATHS, "Prompts of the labels (JSON) for each --rows, for heads."),
    _flag("rounds", _TEXTS, "How rounds choose, as key=value (size=4, sigmas=2); repeatable.", "--round"),
    _flag("watch", _PATHS, "Folder in which fine-tunes are published; repeatable."),
    _flag("settle", _NUMBER, "Seconds a model's files must be still."),
    _flag("rescan", _NUMBER, "Seconds between two looks at what the kernel tells nothing of."),
    _flag("nested", _SWITCH, "Take models in models, and a run's checkpoints, too."),
    _flag("hub", _TEXTS, "What is taken from the Hub, as key=value (watch=true, allow=org/*); repeatable."),
    _flag("sources", _TEXTS, "Settings of another source, as NAME.KEY=VALUE; repeatable.", "--source"),
    _flag("release", _TEXTS, "Where on the Hub the merge is released, as key=value (repo=ORG/NAME); repeatable."),
    _flag("current", _PATH, "Link kept on an export of the newest merge."),
    _flag("tokenizer", _TEXT, "Whose tokenizer an export has: base, a model in the merge, or a directory."),
    _flag("drain", _NUMBER, "Seconds a stop waits for the fold under way."),
    _flag("host", _TEXT, "Address to listen on (loopback)."),
    _flag("port", _WHOLE, "Port of the service; 0 takes a free one."),
    _flag("allow_remote", _SWITCH, "Listen beyond loopback."),
    _flag("allowed_hosts", _TEXTS, "Name by which the service may be asked; repeatable.", "--allowed-host"),
    _flag("log_file", _PATH, "Where log lines go, in place of standard error."),
    _flag("log_json", _SWITCH, "Form of the log lines.", "--log-json/--log-text"),
    _flag("log_level", _TEXT, "debug, info, warning or error."),
)
FLAGS: Mapping[str, inspect.Parameter] = {flag.name: flag for flag in _FLAGS}
"""Every shared flag, by the name of its setting; besides them `config` and `json`."""

OPENING = ("state", "config", "json")
"""Which state is opened, and how the answer is printed."""
MACHINE = ("base", "device", "workers", "memory", "executor", "ray")
"""Where the base is, and what of the machine is used."""
READING = ("base", "workers", "memory", "executor", "ray")
"""The same of a command that only reads the merge."""
GATES = ("weight", "updates", "missing", "vocab", "lineage", "tied", "max_base_ratio", "max_mean_ratio", "gates")
"""What is let in, and with which weight."""
SOURCES = ("hub", "sources")
"""What is taken besides what lies in the watched folders."""
ROUNDS = ("select", "objective", "rows", "heads", "rounds")
"""Whether rounds choose what is folded, and how."""


def _must_be_here(value: object) -> None:
    """Raises Misconfigured for a path that is an address."""
    for one in value if isinstance(value, list | tuple) else (value,):
        if isinstance(one, Path):
            on_disk(one)


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Has a command take these flags, in this order, in place of its parameter `flags`. Typer reads the signature that
    is composed here; a command that needs typer's context calls it `context`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters

        @functools.wraps(function)
        def command(context: typer.Context, **typed: object) -> None:
            given = {name: typed.pop(name) for name in names}
            for value in typed.values():
                _must_be_here(value)
            config, json = given.pop("config", None), given.pop("json", False)
            assert config is None or isinstance(config, Path)
            if "context" in own:
                typed["context"] = context
            function(**typed, flags=Flags(config, bool(json), given, context.obj))

        parameters = {"context": inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)}
        for parameter in own.values():
            taken = [FLAGS[name] for name in names] if parameter.name == "flags" else [parameter]
            parameters |= {p.name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in taken}
        command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        return command

    return decorate
