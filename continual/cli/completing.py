"""What Tab offers of a state: its tags, the models in the merge, and those that are kept out. Where the state cannot be
read it offers nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from continual.state.ledger import Ledger


def refs(context: typer.Context, incomplete: str) -> list[str]:
    """`HEAD` and the tags."""
    return _offered(context, incomplete, lambda ledger: ("HEAD", *ledger.tags))


def merged(context: typer.Context, incomplete: str) -> list[str]:
    """The models in the merge."""
    return _offered(context, incomplete, lambda ledger: (fold.entry.candidate.name for fold in ledger.folds()))


def kept_out(context: typer.Context, incomplete: str) -> list[str]:
    """The models that were refused."""
    return _offered(
        context,
        incomplete,
        lambda ledger: (found.name for one in ledger.refusals if (found := one.entry.candidate) is not None),
    )


def _offered(context: typer.Context, incomplete: str, names: Callable[[Ledger], Iterable[str]]) -> list[str]:
    from continual.config import load
    from continual.errors import ContinualError
    from continual.state import State

    typed = {key: value for key in ("state",) if (value := context.params.get(key)) is not None}
    with contextlib.suppress(ContinualError, OSError):
        settings = load(typed, file=context.params.get("config"))
        with State.open(settings.state) as state:
            found = dict.fromkeys(name for name in names(state.ledger) if name.startswith(incomplete))
            return [name for name in found if name.isprintable()]
    return []
