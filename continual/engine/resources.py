"""What the engine is given to work with. Nothing here knows what the work is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from continual.errors import Abandoned
from continual.executors.contract import Executor
from continual.tensors import Folder, Place

Locate = Callable[[Mapping[str, Any]], Place]
"""Finds the place of a candidate by what its record says of it."""


def local_place(identity: Mapping[str, Any]) -> Place:
    """The directory that a record names."""
    return Folder(Path(identity["origin"]), source=identity["source"])


@dataclass(frozen=True)
class Resources:
    """Where the work runs (`executor`, `device`), how the engine finds a model that a record names (`locate`), and the
    event that ends the work (`stop`)."""

    executor: Executor
    device: torch.device
    locate: Locate = local_place
    stop: threading.Event = field(default_factory=threading.Event)

    def go_on(self, name: str) -> None:
        """Raises Abandoned if continual is stopping. `name` is the candidate or work that the message is about."""
        if self.stop.is_set():
            raise Abandoned(
                f"{name}: the fold was given up because continual is stopping; it will be taken up at the next start"
            )
