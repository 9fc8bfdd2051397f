"""Calibration: one model, and the rows of several tasks. Some rows drive a choice (a loss and its gradient), the others
judge it (a loss each).

What the loss of a row is, its task says (an objective, or a function of the user's). Whose weights are in the model is
not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.objectives import function
from continual.objectives.builtin import OBJECTIVES, Rows
from continual.objectives.causal_lm import CausalLM
from continual.objectives.classes import Classes, Entropy
from continual.objectives.contract import chunks, in_order
from continual.objectives.function import CalibrationTask, FittedTask, ValuedTask, told_as_theirs
from continual.objectives.keeping import ROWS, PromptedTask, Prompts, thinned
from continual.objectives.loading import keep_no_activations, load_model
from continual.objectives.taught import Taught, TellingTask
from continual.objectives.wanted_losses import DTYPES, Wanted

FLOAT16_SCALE = 1024.0
"""The loss is multiplied by this, and the gradient divided, where activations have float16 gradients, which underflow
at 6e-8."""
LEAST = 2
"""Rows that each task needs on either side: one row has no standard error."""


class NotFinite(Misconfigured):
    """A model says nothing finite of a row."""


class Dealt(NamedTuple):
    """A task, what it is called, and the rows that `drive` and that `judge`, each in order of length. `unit` and
    `numbers` say what a row is called in messages: a row, or a line of a file."""

    name: str
    task: CalibrationTask
    drive: list[int]
    judge: list[int]
    unit: str
    numbers: Sequence[int]


class Calibration:
    """The losses of a model. Its parameters may be changed between calls; each call fits the confidence anew."""

    def __init__(
        self,
        model: torch.nn.Module,
        dealt: Sequence[Dealt],
        wanted: Wanted,
        device: torch.device,
        texts: Sequence[Dealt] = (),
    ) -> None:
        """`texts`: of which what the model predicts must stay, once it is said what that is (`remember`)."""
        self.model = model
        self.dealt = dealt
        self._texts, self.kept = texts, list[Dealt]()
        self._batch = wanted.settings.batch
        self._device = device
        self._dtype = DTYPES[wanted.settings.dtype]
        self._reference = wanted.objective if wanted.by_function else None
        self.enlarged = FLOAT16_SCALE if self._dtype == torch.float16 else 1.0
        """By what the gradient is multiplied until `backward` is done."""

    def loss(self) -> float:
        """The mean over tasks of the mean loss of the rows that drive. Raises Misconfigured naming the task and row of
        a loss that is not finite."""
        return math.fsum(self.driving()) / len(self.dealt)

    def driving(self) -> list[float]:
        """Of each task the mean loss of the rows that drive. Raises as `loss` does."""
        return [float(self.losses_of(task, task.drive).mean()) for task in self.dealt]

    def held(self) -> list[Tensor]:
        """Of each task the loss of every row that judges (float64, 1-D, on the CPU), in an order that never changes.
        Raises as `loss` does."""
        return [self.losses_of(task, task.judge) for task in self.dealt]

    def both(self) -> list[Tensor]:
        """Of each task the loss of every row, as `held` has it: those that drive, then those that judge. What is fitted
        is fitted to each kind by itself. Raises as `loss` does."""
        return [torch.cat([self.losses_of(task, task.drive), self.losses_of(task, task.judge)]) for task in self.dealt]

    def teach(self, number: int, by: Calibration | None = None) -> str:
        """Has task `number` keep what the weights that are in memory now say of its rows; those in the memory of `by`,
        where that is given. Returns a digest of it. Only where teachers are wanted."""
        mine, other = self.dealt[number], (by or self).dealt[number]
        assert isinstance(mine.task, Taught), mine.name
        assert isinstance(other.task, Taught), other.name
        for rows in chunks([*mine.drive, *mine.judge], self._batch):
            with torch.no_grad(), self._as_asked():
                mine.task.learn(rows, other.task)
        return mine.task.digest

    def remember(self) -> None:
        """From now on, what the weights in memory say of the texts that must stay is what has to be said of them.
        Those of which nothing is predicted are left out (`kept` has the others)."""
        self.kept = []
        for dealt in self._texts:
            assert isinstance(dealt.task, Taught), dealt.name
            found = []
            for side in (dealt.drive, dealt.judge):
                for rows in chunks(side, self._batch):
                    with torch.no_grad(), self._as_asked():
                        dealt.task.learn(rows, dealt.task)
                found.append(dealt.task.known(side))
            if all(found):
                self.kept.append(dealt._replace(drive=found[0], judge=found[1]))

    def drift(self) -> float | None:
        """How far what is predicted of the texts that judge is from what has to be: the mean over them of KL, in nats a
        token; None where nothing has to stay. Raises as `loss` does."""
        each = [self.losses_of(text, text.judge) for text in self.kept]
        return float(torch.cat(each).mean()) if each else None

    def backward(self) -> float:
        """The loss, with what was predicted of texts that must stay as one more task, and its gradient in the
        parameters' `grad`: None where the loss does not depend on one. The activations of one batch are in memory at a
        time.

        Raises Misconfigured as `loss` does, and for a loss without a gradient or with one that is not finite.
        """
        self.model.zero_grad(set_to_none=True)
        total = []
        texts = sum(len(text.drive) for text in self.kept)
        parts = [(one, len(one.drive) * len(self.dealt)) for one in self.dealt]
        for dealt, of in [*parts, *((text, texts) for text in self.kept)]:
            if isinstance(dealt.task, FittedTask):
                self._fit(dealt.task, dealt, dealt.drive)
            for rows in chunks(dealt.drive, self._batch):
                losses = self._run(dealt, rows, dealt.task.losses)
                if not losses.requires_grad:
                    raise Misconfigured(
                        f"{dealt.name}: its losses have no gradient: they do not depend on the model's parameters"
                    )
                share = losses.double().sum() / of
                total.append(float(share.detach()))
                with told_as_theirs(self._reference):
                    (share * self.enlarged).backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            parameter.grad /= self.enlarged
            if not parameter.grad.isfinite().all():
                hint = ": use dtype = bfloat16 or float32" if self.enlarged != 1 else ""
                raise Misconfigured(f"the loss is finite, and its gradient in {name} is not{hint}")
        return math.fsum(total)

    def each_alone(self, dealt: Dealt) -> Iterator[int]:
        """Runs every row of a task by itself, so that nothing is padded, and yields its number after it; no gradient is
        kept. Raises as `loss` does."""
        run = dealt.task.fit if isinstance(dealt.task, FittedTask) else dealt.task.losses
        self.model.eval()
        for row in sorted([*dealt.drive, *dealt.judge]):
            with torch.no_grad():
                self._run(dealt, [row], run)
            yield row

    def losses_of(self, dealt: Dealt, rows: list[int], *, fit: bool = True) -> Tensor:
        """The losses of these rows of a task without a gradient: float64, 1-D, on the CPU. What is fitted is fitted to
        them, or stays as it was (`fit`). Raises as `loss` does."""
        if fit and isinstance(dealt.task, FittedTask):
            return self._fit(dealt.task, dealt, rows)
        run = dealt.task.losses
        with torch.no_grad():
            found = [self._run(dealt, some, run).detach().double().cpu() for some in chunks(rows, self._batch)]
        return torch.cat(found)

    def worth_of(self, dealt: Dealt, rows: list[int]) -> Tensor | None:
        """What these rows of a task are worth (float64, 1-D, on the CPU), more being better; None of a task that has
        losses alone. Raises as `loss` does."""
        if not isinstance(dealt.task, ValuedTask):
            return None
        with torch.no_grad():
            return self._run(dealt, rows, dealt.task.worth).detach().double().cpu()

    def _fit(self, task: FittedTask, dealt: Dealt, rows: list[int]) -> Tensor:
        with torch.no_grad():
            return self._run(dealt, rows, task.fit).detach().double().cpu()

    def _run(self, dealt: Dealt, rows: Sequence[int], run: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """The losses of rows as the task says them. Raises Misconfigured where they are no losses, NotFinite where one
        is not finite."""
        with self._as_asked():
            found: object = run(rows)
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != (len(rows),) or not found.is_floating_point():
            what = (
                f"{found.dtype} of shape {list(found.shape)}"
                if isinstance(found, torch.Tensor)
                else type(found).__name__
            )
            raise Misconfigured(
                f"{dealt.name}: {run.__name__} of {len(rows)} rows has to be a tensor of as many losses, and is {what}"
            )
        if not (finite := found.detach().isfinite()).all():
            first = int((~finite).nonzero()[0, 0])
            raise NotFinite(
                f"{dealt.name}: the loss of {dealt.unit} {dealt.numbers[rows[first]]} is {float(found[first].detach())}"
            )
        return found

    @contextmanager
    def _as_asked(self) -> Iterator[None]:
        """Runs the model in the dtype that is wanted."""
        mixed = self._dtype != torch.float32
        with (
            told_as_theirs(self._reference),
            # A cache of weights in half precision would outlive a change of the weights.
            torch.autocast(self._device.type, self._dtype if mixed else None, enabled=mixed, cache_enabled=False),
        ):
            yield


def load(wanted: Wanted, directory: Path, device: torch.device) -> Calibration:
    """The losses that are wanted, of the model in `directory`, or of the model that the user's function makes of it.

    Raises Misconfigured for a model, rows or a function that cannot be used, saying why.
    """
    if wanted.by_function:
        given = function.call(wanted.objective, directory, device)
        names = [f"{wanted.objective}, task {number}" for number in range(len(given.tasks))]
        tasks = [_taught(*pair) if wanted.taught else pair[1] for pair in zip(names, given.tasks, strict=True)]
        dealt = [_deal(wanted, *pair) for pair in zip(names, tasks, strict=True)]
        return Calibration(given.model, dealt, wanted, device, _prompts(dealt, given.tasks))
    settings = wanted.settings
    kind = OBJECTIVES[wanted.objective]
    loaded = load_model(kind, directory, device, still=settings.checkpointing)
    dealt, asked = [], list[CalibrationTask]()
    for file, heads in zip(wanted.rows, wanted.heads or (None,) * len(wanted.rows), strict=True):
        objective = kind(
            loaded, Rows(kind.name, file, heads, settings.batch), labels=not (settings.unsupervised or wanted.taught)
        )
        task: CalibrationTask = objective
        if settings.unsupervised and isinstance(objective, Classes):
            task = Entropy(objective)
        if wanted.taught:
            task = _taught(str(file), objective)
        dealt.append(_deal(wanted, str(file), task, objective.lengths, objective.lines))
        asked.append(objective)
    texts = _prompts(dealt, asked)
    if wanted.keep is not None:
        text = CausalLM(loaded, Rows(CausalLM.name, wanted.keep, None, settings.batch))
        texts = [_deal(wanted, str(wanted.keep), Taught(text), text.lengths, text.lines)]
    model = loaded.model.requires_grad_(True)
    if settings.checkpointing:
        keep_no_activations(model)
    return Calibration(model, dealt, wanted, device, texts)


def _prompts(dealt: Sequence[Dealt], tasks: Sequence[CalibrationTask]) -> list[Dealt]:
    """The prompts of tasks that have some, dealt as their rows are."""
    most = max(1, ROWS // len(dealt))
    return [
        one._replace(task=Taught(Prompts(task)), drive=thinned(one.drive, most), judge=thinned(one.judge, most))
        for one, task in zip(dealt, tasks, strict=True)
        if isinstance(task, PromptedTask) and callable(task.prompts)  # a user's may be a list of texts
    ]


def _taught(name: str, task: CalibrationTask) -> Taught:
    """Raises Misconfigured for a task whose model cannot be asked."""
    if not isinstance(task, TellingTask):
        raise Misconfigured(
            f"{name}: a task that a teacher teaches has a method `says`, and {type(task).__name__} has not"
        )
    return Taught(task)


def _deal(
    wanted: Wanted,
    name: str,
    task: CalibrationTask,
    lengths: Sequence[int] | None = None,
    lines: Sequence[int] | None = None,
) -> Dealt:
    """Deals the rows of a task, by the seed alone: the other tasks, and what a row says, do not matter. `lengths` and
    `lines` are those of rows of a file. Raises Misconfigured where there are too few rows."""
    count = task.count
    held, seed = wanted.settings.held, wanted.settings.seed
    judging = round(count * held)
    if min(judging, count - judging) < LEAST:
        raise Misconfigured(
            f"{name}: of its {count} rows {judging} would judge and {count - judging} drive (held = {held}); "
            f"at least {LEAST} of each are needed"
        )
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    judges = set(shuffled[:judging])
    order = in_order([0] * count if lengths is None else lengths)
    drive = [i for i in order if i not in judges]
    judge = [i for i in order if i in judges]
    return Dealt(name, task, drive, judge, "row" if lines is None else "line", range(count) if lines is None else lines)
