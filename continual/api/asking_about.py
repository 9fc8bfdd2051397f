"""Who is asked about the merge of an open state before a fold is committed, as the settings say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from continual.config import Settings
from continual.engine.reading import Reading
from continual.engine.resources import Judge
from continual.errors import Abandoned
from continual.evaluation.askers import Asker, CommandAsker, HarnessAsker
from continual.evaluation.evaluator import Evaluator
from continual.evaluation.on_rows import RowsAsker
from continual.executors.contract import Executor, silent
from continual.executors.device import pick_device
from continual.publish import folder
from continual.state import State
from continual.tensors import BaseModel, Folder


@dataclass(frozen=True)
class AroundMerge:
    """What an asker needs of an open state: its base with the weights, for a while; how the merge of a state is read;
    where work runs; the event that ends it."""

    weights: Callable[[], AbstractContextManager[BaseModel]]
    reading_of: Callable[[State], Reading]
    executor: Executor
    stopping: threading.Event

    def export(self, state: State, target: Path) -> None:
        """Writes the merge of `state`, which may be on trial, as a model directory."""
        with self.weights() as whole:
            folder.export(whole, self.reading_of(state), folder.Target(target), self.executor, silent)

    def base(self) -> Path | None:
        """The directory of the base; None where it is in no folder."""
        with self.weights() as whole:
            place = whole.checkpoint.place
            return place.path if isinstance(place, Folder) else None

    def go_on(self) -> None:
        """Raises Abandoned where continual is stopping."""
        if self.stopping.is_set():
            raise Abandoned("the evaluation was given up because continual is stopping; nothing was recorded")


def judge_of(settings: Settings, around: AroundMerge) -> Judge | None:
    """What the settings have asked about the merge before a fold is committed; None where that is nothing. Raises
    Misconfigured where it cannot be asked, as far as that is seen from outside."""
    wanted = settings.evaluation
    asker: Asker
    if wanted.command:
        asker = CommandAsker(wanted, around)
    elif wanted.objective:
        work = around.executor, pick_device(settings.device)
        asker = RowsAsker(wanted, around.weights, around.reading_of, work, around.go_on)
    elif wanted.lm_eval:
        asker = HarnessAsker(wanted, around)
    else:
        return None
    return Evaluator(wanted, asker)
