"""`continual config`: which settings are in force, where each was set, and what a systemd unit needs for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from continual.cli import console, opened
from continual.cli.flags import FLAGS, Flags, takes
from continual.texts import size

app = typer.Typer(rich_markup_mode=None)
config = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Show which settings are in force, and why.")
app.add_typer(config, name="config")


@config.callback()
def _config() -> None:
    """Show which settings are in force, and why."""


@config.command()
@takes(*[name for name in FLAGS if name not in ("json",)], "json")
def show(
    changed: Annotated[bool, typer.Option("--changed", help="Only those that were set somewhere.")] = False,
    *,
    flags: Flags,
) -> None:
    """Show every setting: its value, and whether a flag, the environment or a file set it. What a running daemon was
    started with is on its page."""
    from continual.config.given import look
    from continual.service.in_force import shown

    looked = look(flags.settings, file=flags.config)
    rows = [row for row in shown(looked) if not changed or row["from"] != "default"]
    if flags.json:
        console.emit(rows)
    else:
        console.table(
            ("setting", "value", "from"),
            [(row["setting"], _text(row["value"], str(row["setting"])), row["from"]) for row in rows],
        )


@config.command()
@takes("state", "config")
def unit(*, flags: Flags) -> None:
    """Print what the unit of systemd needs for these settings, as a drop-in: folders to write, mounts, network, time to
    stop."""
    from continual.service.unit import drop_in

    console.say(drop_in(opened.settings(flags), str(flags.config or "the settings")).rstrip("\n"), lines=True)


def _text(value: object, name: str = "") -> str:
    """The value of a setting as people read it, and as a settings file takes it."""
    from continual.config.values import parse_bytes

    if name.rpartition(".")[2] in ("memory", "keep_bytes", "max_bytes") and isinstance(value, int):
        return size(value) if parse_bytes(size(value)) == value else f"{size(value)} ({value})"
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(one) for one in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
