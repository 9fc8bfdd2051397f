"""What every command begins with: settings from file, environment and flags, and the state they name, opened. Heavy
imports happen when it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.config import Settings


def settings(config: Path | None, **flags: Any) -> Settings:
    """Settings of a command. Raises Misconfigured."""
    from continual.config import load

    return load(flags, file=config)


@contextlib.contextmanager
def merge(config: Path | None, write: bool = False, **flags: Any) -> Iterator[Merge]:
    """The state that the settings name, opened."""
    from continual.api import Merge

    with Merge(settings(config, **flags), write=write) as found:
        yield found
