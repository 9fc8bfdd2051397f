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

    def of(self, state: State) -> MergeOfState:
        """The merge of `state`, which may be on trial."""
        return MergeOfState(self, state)

    def go_on(self) -> None:
        """Raises Abandoned where continual is stopping."""
        if self.stopping.is_set():
            raise Abandoned("the evaluation was given up because continual is stopping; nothing was recorded")


@dataclass(frozen=True)
class MergeOfState:
    """The merge of a state, to be asked about: as a new export, the base where it lies."""

    around: AroundMerge
    state: State

    def directory(self, place: Path) -> Path | None:
        """An export in `place`; of a state without a fold the directory of the base, None where that is in no
        folder."""
        with self.around.weights() as whole:
            if not self.state.ledger.folds():
                base = whole.checkpoint.place
                return base.path if isinstance(base, Folder) else None
            target = folder.Target(place / "model")
            return folder.export(whole, self.reading(), target, self.around.executor, silent)

    def reading(self) -> Reading:
        """How it is read."""
        return self.around.reading_of(self.state)


def asker_of(settings: Settings, around: AroundMerge) -> Asker | None:
    """Who is asked about a merge, by the settings; None where nobody is. Raises Misconfigured where nobody can be, as
    far as that is seen from outside."""
    wanted = settings.evaluation
    if wanted.command:
        return CommandAsker(wanted, around.stopping)
    if wanted.objective:
        return RowsAsker(wanted, around.weights, (around.executor, pick_device(settings.device)), around.go_on)
    return HarnessAsker(wanted, around.stopping) if wanted.lm_eval else None


def judge_of(settings: Settings, around: AroundMerge) -> Judge | None:
    """What the settings have asked about the merge before a fold is committed; None where that is nothing. Raises as
    `asker_of`."""
    asker = asker_of(settings, around)
    return None if asker is None else Evaluator(settings.evaluation, asker, around.of)
