"""What a command begins with: the settings from file, environment and flags, and the state that they name, opened.
Heavy imports happen when it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.cli.flags import Flags
    from continual.config import Settings


def settings(flags: Flags) -> Settings:
    """The settings of a command. Raises Misconfigured."""
    from continual.config import load

    return load(flags.settings, file=flags.config)


@contextlib.contextmanager
def merge(flags: Flags, *, write: bool = False) -> Iterator[Merge]:
    """The state that the settings name, opened. Raises Misconfigured, Busy and Damaged."""
    from continual.api import Merge

    with Merge(settings(flags), write=write, client=flags.client) as found:
        yield found
