"""Calibration rows as what says how much a merge is worth: the model is in memory, and gets one merge after the other.

Of a task with classes each row's number is its share in the mean probability of the right class, with the confidence
that fits each merge best (`shares_of_right`): a merge that is only less sure of everything has lost nothing, and the
error of the fit, which all rows have in common, is in the shares. A task of a user's function may have `worth`, too.
Of any other objective it is the loss, of which less is better; what such a task fits stays as it fits the first merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from continual.config import CalibrationSettings
from continual.config.evaluating import EvaluationSettings
from continual.evaluation.askers import AskedMerge, Files, files_now
from continual.evaluation.scores import Metric
from continual.evaluation.verdict import Answers
from continual.executors.contract import Executor, silent
from continual.lazily import torch
from continual.objectives.calibration import Calibration, Dealt, NotFinite, load
from continual.objectives.parameters import Parameters, find_parameters
from continual.objectives.wanted_losses import Wanted
from continual.tensors import BaseModel
from continual.tensors.layouts.in_classes import elsewhere
from continual.tuning.command import CommandFailed
from continual.tuning.scoring import fill

Weights = Callable[[], AbstractContextManager[BaseModel]]
"""Opens the base with its weights for a while."""


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
        work: tuple[Executor, torch.device],
        go_on: Callable[[], None],
    ) -> None:
        """Raises Misconfigured for rows or an objective that cannot be used, as far as that is seen from outside."""
        self._wanted = wanted_of(settings)
        self._wanted.check()
        self._weights = weights
        self._executor, self._device = work
        self._go_on = go_on
        self._fitted = False
        self._files: Files = ()
        self._loaded: tuple[Calibration, Parameters] | None = None

    def asked_by(self) -> Files:
        """The rows, and the prompts of their labels."""
        return files_now((*self._wanted.rows, *self._wanted.heads))

    def __call__(self, merge: AskedMerge, what: str, rows: int) -> Answers:  # noqa: ARG002 - errors name task and row
        with self._weights() as base:
            calibration, held = self._opened(base)
            reading = merge.reading()
            reading.settle(self._executor, silent)
            fill(held, base, reading, self._executor)
        try:
            return self._answers(calibration, rows)
        except NotFinite as error:
            raise CommandFailed(str(error)) from None

    def _answers(self, calibration: Calibration, rows: int) -> Answers:
        metrics: dict[str, Metric] = {}
        lower: set[str] = set()
        for name, dealt in zip(_names(calibration.dealt), calibration.dealt, strict=True):
            self._go_on()
            some = _first(dealt, rows)
            found = calibration.worth_of(dealt, some)
            if found is None:
                found = calibration.losses_of(dealt, some, fit=not self._fitted)
                lower.add(name)
            metrics[name] = tuple(found.tolist())
        self._fitted = True
        return Answers(metrics, frozenset(lower))

    def _opened(self, base: BaseModel) -> tuple[Calibration, Parameters]:
        """The losses of the model of the base, and where it holds the base's tensors: loaded anew where rows were
        changed."""
        if self._loaded is None or self._files != self.asked_by():
            self._loaded, self._fitted, self._files = None, False, self.asked_by()
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
