"""The flags that several commands share. Unset ones leave the setting to the settings file and the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StateDir = Annotated[
    Path | None,
    typer.Option("--state", help="Directory of the state; else CONTINUAL_STATE, else ./state.", show_default=False),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="Settings file (TOML); else CONTINUAL_CONFIG.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default=False)]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Tensors folded at a time; 0: one per core.", show_default=False)
]
Memory = Annotated[
    str | None, typer.Option("--memory", help="What the tensors in flight may take, as 4GB.", show_default=False)
]
BaseDir = Annotated[
    Path | None, typer.Option("--base", help="Where the base is now, if it was moved since init.", show_default=False)
]
Scale = Annotated[
    str | None,
    typer.Option("--scale", help="Read-time scale: spread:C, norm:KAPPA, a number, auto or paper.", show_default=False),
]
Lines = Annotated[
    str | None,
    typer.Option(
        "--lines",
        help="Layer scaling at reading, ALPHA:BETA (LiNeS: ALPHA + BETA x depth), or none.",
        show_default=False,
    ),
]
Weight = Annotated[
    str | None,
    typer.Option("--weight", help="Weight of the models: a number, FILE.json:KEY or metadata:KEY.", show_default=False),
]
Updates = Annotated[
    str | None, typer.Option("--updates", help="New files at a place folded before: refuse or add.", show_default=False)
]
Missing = Annotated[
    str | None, typer.Option("--missing", help="A tensor the fine-tune lacks: refuse or unchanged.", show_default=False)
]
Vocab = Annotated[
    str | None, typer.Option("--vocab", help="Another vocabulary size: refuse or common-rows.", show_default=False)
]
MaxBase = Annotated[
    float | None,
    typer.Option("--max-base-ratio", help="Largest task-vector norm, times the base's norm.", show_default=False),
]
Select = Annotated[
    str | None,
    typer.Option(
        "--select", help="Let models wait for rounds that choose: none, relevance or frank-wolfe.", show_default=False
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective", help="What is good: causal-lm, classification, heads or module:function.", show_default=False
    ),
]
Rows = Annotated[
    list[Path] | None,
    typer.Option("--rows", help="Calibration rows of a task (JSONL); repeatable.", show_default=False),
]
Heads = Annotated[
    list[Path] | None,
    typer.Option("--heads", help="Prompts of the labels (JSON) for each --rows, for heads.", show_default=False),
]
Rounds = Annotated[
    list[str] | None,
    typer.Option("--round", help="How rounds choose, as key=value (size=4, sigmas=2); repeatable.", show_default=False),
]
HubFlags = Annotated[
    list[str] | None,
    typer.Option(
        "--hub",
        help="What is taken from the Hub, as key=value (watch=true, allow=org/*); repeatable.",
        show_default=False,
    ),
]
SourceFlags = Annotated[
    list[str] | None,
    typer.Option("--source", help="Settings of another source, as NAME.KEY=VALUE; repeatable.", show_default=False),
]
ReleaseFlags = Annotated[
    list[str] | None,
    typer.Option(
        "--release",
        help="Where on the Hub the merge is released, as key=value (repo=ORG/NAME); repeatable.",
        show_default=False,
    ),
]
