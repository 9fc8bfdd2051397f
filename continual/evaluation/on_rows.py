"""Calibration rows as what says how much a merge is worth: the model is in memory, and gets one merge after the other.

Of a task with classes each row's number is the probability of the right class, with the confidence (objectives/classes)
that fits the first merge that is asked best. It stays for all others: one fitted to each would add an error that all
rows have in common, which no standard error over rows knows of. A task of a user's
function says by `of_classes = True` that its losses are minus the logarithm of that. Of any other objective it is the
loss, of which less is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from continual.config import CalibrationSettings
from continual.config.evaluating import EvaluationSettings
from continual.engine.reading import Reading
from continual.evaluation.scores import Metric
from continual.evaluation.verdict import Answers
from continual.executors.contract import Executor, silent
from continual.lazily import torch
from continual.objectives.calibration import Calibration, Dealt, Wanted, load
from continual.objectives.parameters import Parameters, find_parameters
from continual.state import State
from continual.tensors import BaseModel
from continual.tensors.layouts.in_classes import elsewhere
from continual.tuning.scoring import fill

Weights = Callable[[], AbstractContextManager[BaseModel]]
"""Opens the base with its weights for a while."""
ReadingOf = Callable[[State], Reading]
"""How the merge of a state is read."""


def wanted_of(settings: EvaluationSettings) -> Wanted:
    """Which losses, on which rows. Raises Misconfigured naming what is missing or cannot be used."""
    assert settings.objective is not None
    return Wanted(settings.objective, settings.rows, settings.heads, CalibrationSettings())


class RowsAsker:
    """Asks rows. The model of the base stays in memory, in float32, once it was loaded. Not thread-safe."""

    grows = True

    def __init__(
        self,
        settings: EvaluationSettings,
        weights: Weights,
        reading_of: ReadingOf,
        work: tuple[Executor, torch.device],
        go_on: Callable[[], None],
    ) -> None:
        """Raises Misconfigured for rows or an objective that cannot be used, as far as that is seen from outside."""
        self._wanted = wanted_of(settings)
        self._wanted.check()
        self._weights = weights
        self._reading_of = reading_of
        self._executor, self._device = work
        self._go_on = go_on
        self._fitted = False
        self._loaded: tuple[Calibration, Parameters] | None = None

    def __call__(self, state: State, what: str, rows: int) -> Answers | None:  # noqa: ARG002 - errors name task and row
        with self._weights() as base:
            calibration, held = self._opened(base)
            reading = self._reading_of(state)
            reading.settle(self._executor, silent)
            fill(held, base, reading, self._executor)
        metrics: dict[str, Metric] = {}
        lower: set[str] = set()
        for name, dealt in zip(_names(calibration.dealt), calibration.dealt, strict=True):
            self._go_on()
            losses = calibration.losses_of(dealt, _first(dealt, rows), fit=not self._fitted)
            right = getattr(dealt.task, "of_classes", False) is True
            metrics[name] = tuple(((-losses).exp() if right else losses).tolist())
            lower |= set() if right else {name}
        self._fitted = True
        return Answers(metrics, frozenset(lower))

    def _opened(self, base: BaseModel) -> tuple[Calibration, Parameters]:
        """The losses of the model of the base, and where it holds the base's tensors."""
        if self._loaded is None:
            calibration = load(self._wanted, base.checkpoint.directory, self._device)
            calibration.model.requires_grad_(False)
            there = [spec for spec in base.specs if spec.kind == "carried" or spec.name in base.checkpoint.tensors]
            self._loaded = calibration, find_parameters(calibration.model, there, base.aliases, elsewhere(base))
        return self._loaded


def _names(dealt: Sequence[Dealt]) -> list[str]:
    """What metrics are called: the file's name without its ending, where that tells the tasks apart."""
    short = [Path(one.name).stem for one in dealt]
    return short if len(set(short)) == len(short) else [one.name for one in dealt]


def _first(dealt: Dealt, count: int) -> list[int]:
    """The first rows of an order drawn by chance and always the same, so that more rows are these and others; in order
    of length, as batches want them."""
    known = [*dealt.drive, *dealt.judge]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    some = {sorted(known)[number] for number in order[:count]}
    return [row for row in known if row in some]
