"""`continual import-recipe`: a merge that is written down for mergekit, as settings and commands of continual."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from continual.cli import console
from continual.cli.flags import Json

app = typer.Typer(rich_markup_mode=None)


@app.command(name="import-recipe")
def import_recipe(
    file: Annotated[Path, typer.Argument(help="A configuration of mergekit (YAML).")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base, where the file names none, as for linear.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Print the settings file that makes the merge of a mergekit configuration, and what to type then. Nothing is
    changed; a key that has no equal here is refused by its name."""
    from continual.config import mergekit

    found = mergekit.read(file, base)
    if json:
        console.emit({"recipe": found, "settings": found.settings(), "commands": found.commands()})
    else:
        console.say(found.settings(), lines=True)
