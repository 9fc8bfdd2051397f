"""Folds on trial: the state as it would be with some models more, to be read and never recorded."""

from __future__ import annotations

import copy
from types import TracebackType

from continual.engine.engine import Engine
from continual.engine.staging import staged
from continual.executors.contract import Progress
from continual.state import Transaction
from continual.tensors import Model


class Trials:
    """What is folded on trial on the state of `engine`. A context manager: leaving it drops what was written; what a
    kill leaves is removed when the state is opened next. There are never more generations on disk than trials."""

    def __init__(self, engine: Engine, progress: Progress) -> None:
        self._engine = engine
        self._progress = progress
        self._written: dict[str, Transaction] = {}

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for transaction in self._written.values():
            transaction.abandon()

    def fold(self, on: Engine, model: Model) -> Engine | None:
        """An engine over the state that `on` has, with an open model folded besides; None where the model would be
        refused. `on` is the engine that folds in earnest, or one that this returned. Raises Retry and Halt."""
        begun: list[Transaction] = []

        def begin(writes: int) -> Transaction:
            begun.append(self._engine.state.begin(on.state.generation_of(on.state.ledger.head), writes))
            return begun[0]

        trial = on.fold_on_trial(model, begin, self._progress)
        if trial is None:
            return None
        transaction = begun[0]
        self._written[transaction.id] = transaction
        found = copy.copy(on)
        found.state = staged(on.state, trial.generation, trial.entry)
        return found

    def drop(self, engine: Engine) -> None:
        """Drops what `fold` wrote for this engine, on which nothing is to be folded any more."""
        self._written.pop(engine.state.ledger.head.generation or "").abandon()
