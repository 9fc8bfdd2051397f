"""What the engine is given to work with. Nothing here knows what the work is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from continual.errors import Abandoned
from continual.executors.contract import Executor
from continual.lazily import torch
from continual.records import Candidate
from continual.state import State
from continual.state.parts import Evaluated
from continual.tensors import BaseModel, Folder, Place

Locate = Callable[[Candidate], Place]
"""Finds the place of a candidate that a record names."""
OpenWeights = Callable[[], BaseModel]
"""Opens the base of a state that keeps none of its weights, to read some; the caller does not close it. It raises Halt
where they are not there, Retry."""


class Opinion(NamedTuple):
    """What was found of a merge before its commit, and what is to be said of it as a warning."""

    evaluated: Evaluated
    doubt: str | None = None


Judge = Callable[[State, State, str], Opinion]
"""Says of the state as it would be with a candidate, beside the one in force, what it is worth; the third is the
candidate's name. It raises Refuse where it is worse, Retry and Misconfigured where it cannot be asked."""


def local_place(candidate: Candidate) -> Place:
    """The directory that a candidate came from."""
    return Folder(Path(candidate.origin), source=candidate.source)


class Workplace(Protocol):
    """Where a tensor is worked on: the device, and whether to go on."""

    @property
    def device(self) -> torch.device: ...

    def go_on(self, name: str) -> None:
        """Raises Abandoned if continual is stopping. `name` is the candidate or work that the message is about."""
        ...


class AwayPlace(NamedTuple):
    """A workplace in a process that does orders of another, which ends it when it stops."""

    device: torch.device

    def go_on(self, name: str) -> None:
        """Goes on."""


@dataclass(frozen=True)
class Resources:
    """Where the work runs (`executor`, `device`), how the engine finds a model that a record names (`locate`), the
    event that ends the work (`stop`), how it opens the weights of a base of which it has the headers alone, and the
    rule that reads the merge where the settings name one (`reads`), and what is asked about the merge before a fold is
    committed (`judge`)."""

    executor: Executor
    device: torch.device
    locate: Locate = local_place
    stop: threading.Event = field(default_factory=threading.Event)
    open_weights: OpenWeights | None = None
    reads: str | None = None
    judge: Judge | None = None

    @property
    def device_elsewhere(self) -> str:
        """The device of other processes that do work of this one."""
        return self.executor.elsewhere or str(self.device)

    def go_on(self, name: str) -> None:
        """Raises Abandoned if continual is stopping. `name` is the candidate or work that the message is about."""
        if self.stop.is_set():
            raise Abandoned(
                f"{name}: the fold was given up because continual is stopping; it will be taken up at the next start"
            )
