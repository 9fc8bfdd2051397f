"""Calibration: one model and the rows of several tasks, of which some drive a choice (a loss and its gradient) and the
others judge it (a loss each).

What a row's loss is, is its task's to say (`objectives`, or a function of the user's). Whose weights are in the model
is not known here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from blake3 import blake3
from torch import Tensor

from continual.errors import Misconfigured
from continual.objectives.objectives import OBJECTIVES, Ask, Classes, Entropy, chunks, in_order, load_model

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT16_SCALE = 1024.0
"""What the loss is multiplied by, and the gradient divided, where activations have float16 gradients, which underflow
at 6e-8."""
LEAST = 2
"""Rows that each task needs on either side: one has no standard error."""


@runtime_checkable
class Task(Protocol):
    """Rows of one task: `count` of them."""

    count: int

    def losses(self, rows: Sequence[int]) -> Tensor:
        """1-D, differentiable: the loss of each of these rows under the model's present weights. Rows are numbered from
        0."""
        ...


@runtime_checkable
class Fitted(Task, Protocol):
    """A task with something to fit at the present weights before losses mean much, such as the confidence of a
    classifier."""

    def fit(self, rows: Sequence[int]) -> Tensor:
        """Fits to these rows, for the `losses` that follow, and returns the losses of these rows as fitted, in their
        order; no gradient is kept.

        The gradient of `losses`, what was fitted held fixed, has to be that of the fitted loss, as it is where the fit
        minimises the mean loss.
        """
        ...


class Given(NamedTuple):
    """What a user's function returns: a model, its parameters named as the base's tensors, and tasks that run it."""

    model: torch.nn.Module
    tasks: Sequence[Task]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which losses, on which rows. `dtype` is that of the matrix products; weights and gradients are float32."""

    objective: str
    """causal-lm, classification, heads, or module:function."""
    rows: tuple[Path, ...] = ()
    heads: tuple[Path, ...] = ()
    batch: int = 16
    seed: int = 0
    held: float = 0.5
    """The share of each task's rows that judge."""
    dtype: Dtype = "float32"
    checkpointing: bool = False
    unsupervised: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES and not self.by_function:
            raise Misconfigured(
                f"objective = {self.objective!r}: use one of {', '.join(OBJECTIVES)}, or module:function"
            )
        if self.batch < 1:
            raise Misconfigured(f"batch = {self.batch}: at least 1")
        if not 0 < self.held < 1:
            raise Misconfigured(f"held = {self.held}: the share of the rows that judge has to be over 0 and under 1")
        if self.dtype not in DTYPES:
            raise Misconfigured(f"dtype = {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.by_function:
            named = (
                ("rows", self.rows),
                ("heads", self.heads),
                ("checkpointing", self.checkpointing),
                ("unsupervised", self.unsupervised),
            )
            if given := next((name for name, value in named if value), None):
                raise Misconfigured(
                    f"{given} is for the built-in objectives; with {self.objective} it is the function's own business"
                )
            return
        if not self.rows:
            raise Misconfigured(f"rows: the objective {self.objective} needs a JSONL file of rows for each task")
        if self.objective == "heads" and len(self.heads) != len(self.rows):
            raise Misconfigured(
                f"heads: one JSON file of prompts for each file of rows; there are {len(self.heads)} for {len(self.rows)}"
            )
        if self.objective != "heads" and self.heads:
            raise Misconfigured(f"heads are for the objective heads; {self.objective} takes none")
        if self.unsupervised and self.objective == "causal-lm":
            raise Misconfigured("unsupervised is for objectives with classes; causal-lm needs no labels anyway")

    @property
    def by_function(self) -> bool:
        """Whether the objective is a function of the user's."""
        module, colon, function = self.objective.partition(":")
        return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))

    def told(self) -> dict[str, Any]:
        """What a record keeps: `digest` is over all the rest, which holds the digests of files and of a function's
        module."""
        found: dict[str, Any] = {
            "kind": "function" if self.by_function else "rows",
            "objective": self.objective,
            "seed": self.seed,
            "held": self.held,
            "batch": self.batch,
            "dtype": self.dtype,
            "unsupervised": self.unsupervised,
        }
        if self.by_function:
            with _theirs(self.objective):
                found["code"] = _imported(self.objective.partition(":")[0])
        else:
            found["rows"] = [_file(file) for file in self.rows]
        if self.heads:
            found["heads"] = [_file(file) for file in self.heads]
        text = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return found | {"digest": f"blake3:{blake3(text.encode()).hexdigest()}"}


class Count(NamedTuple):
    """Rows of a task."""

    drive: int
    judge: int


class Dealt(NamedTuple):
    """A task, what it is called, and its rows, dealt and in order of length; `unit` and `numbers` say what a row is
    called."""

    name: str
    task: Task
    drive: list[int]
    judge: list[int]
    unit: str
    numbers: Sequence[int]


class Calibration:
    """The losses of a model. Its parameters may be changed between calls; each call fits the confidence anew."""

    def __init__(self, model: torch.nn.Module, dealt: Sequence[Dealt], wanted: Wanted, device: torch.device) -> None:
        self.model = model
        self.names = [task.name for task in dealt]
        self.counts = [Count(len(task.drive), len(task.judge)) for task in dealt]
        self.dealt = dealt
        self._batch = wanted.batch
        self._device = device
        self._dtype = DTYPES[wanted.dtype]
        self._reference = wanted.objective if wanted.by_function else None

    def loss(self) -> float:
        """The mean over tasks of the mean loss of the rows that drive. Raises Misconfigured naming the task and row of
        a loss that is not finite."""
        return math.fsum(float(self._found(task, task.drive).mean()) for task in self.dealt) / len(self.dealt)

    def held(self) -> list[Tensor]:
        """Of each task the loss of every row that judges (float64, CPU), in an order that never changes."""
        return [self._found(task, task.judge) for task in self.dealt]

    def backward(self) -> float:
        """The loss, and its gradient in the parameters' `grad`, None where it does not depend on one. One batch's
        activations are in memory at a time."""
        self.model.zero_grad(set_to_none=True)
        scale = FLOAT16_SCALE if self._dtype == torch.float16 else 1.0
        total = []
        for dealt in self.dealt:
            if isinstance(dealt.task, Fitted):
                self._fit(dealt, dealt.drive)
            for rows in chunks(dealt.drive, self._batch):
                losses = self._run(dealt, rows, dealt.task.losses)
                if not losses.requires_grad:
                    raise Misconfigured(
                        f"{dealt.name}: its losses have no gradient: they do not depend on the model's parameters"
                    )
                share = losses.double().sum() / (len(dealt.drive) * len(self.dealt))
                total.append(float(share.detach()))
                with _theirs(self._reference):
                    (share * scale).backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            parameter.grad /= scale
            if not parameter.grad.isfinite().all():
                hint = ": use dtype = bfloat16 or float32" if scale != 1 else ""
                raise Misconfigured(f"the loss is finite, and its gradient in {name} is not{hint}")
        return math.fsum(total)

    def _found(self, dealt: Dealt, rows: list[int]) -> Tensor:
        if isinstance(dealt.task, Fitted):
            return self._fit(dealt, rows)
        with torch.no_grad():
            return torch.cat(
                [
                    self._run(dealt, some, dealt.task.losses).detach().double().cpu()
                    for some in chunks(rows, self._batch)
                ]
            )

    def _fit(self, dealt: Dealt, rows: list[int]) -> Tensor:
        assert isinstance(dealt.task, Fitted)
        with torch.no_grad():
            return self._run(dealt, rows, dealt.task.fit).detach().double().cpu()

    def _run(self, dealt: Dealt, rows: Sequence[int], run: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """The losses, looked over."""
        mixed = self._dtype != torch.float32
        with (
            _theirs(self._reference),
            # A cache of weights in half precision would outlive a change of the weights
            torch.autocast(self._device.type, self._dtype if mixed else None, enabled=mixed, cache_enabled=False),
        ):
            found: Any = run(rows)
        if not isinstance(found, Tensor) or tuple(found.shape) != (len(rows),) or not found.is_floating_point():
            what = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise Misconfigured(
                f"{dealt.name}: {run.__name__} of {len(rows)} rows has to be a tensor of as many losses, and is {what}"
            )
        if not (finite := found.detach().isfinite()).all():
            first = int((~finite).nonzero()[0, 0])
            raise Misconfigured(
                f"{dealt.name}: the loss of {dealt.unit} {dealt.numbers[rows[first]]} is {float(found[first].detach())}"
            )
        return found


def load(wanted: Wanted, directory: Path, device: torch.device) -> Calibration:
    """The losses that are wanted, of the model in `directory`, or of what the user's function makes of it.

    Raises Misconfigured for a model, rows or a function that cannot be used, saying why.
    """
    if wanted.by_function:
        given = _given(wanted.objective, directory, device)
        dealt = [
            _dealt(wanted, f"{wanted.objective}, task {i}", task, [0] * task.count, "row", range(task.count))
            for i, task in enumerate(given.tasks)
        ]
        return Calibration(given.model, dealt, wanted, device)
    loaded = load_model(wanted.objective, directory, device, still=wanted.checkpointing)
    dealt = []
    for file, heads in zip(wanted.rows, wanted.heads or (None,) * len(wanted.rows), strict=True):
        ask = Ask(wanted.objective, file, heads, wanted.batch)
        rows = OBJECTIVES[wanted.objective](loaded, ask, labels=not wanted.unsupervised)
        task: Task = Entropy(rows) if wanted.unsupervised and isinstance(rows, Classes) else rows
        dealt.append(_dealt(wanted, str(file), task, rows.lengths, "line", rows.lines))
    model = loaded.model.requires_grad_(True)
    if wanted.checkpointing:
        _checkpoint(model)
    return Calibration(model, dealt, wanted, device)


def _checkpoint(model: Any) -> None:
    """Keeps no activations inside the layers of a transformers model. It does so in training mode alone; what is
    dropped at random was set to 0."""
    model.config.use_cache = False
    new = hasattr(model, "activation_checkpointing_enable")  # the name from transformers 5 on
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    try:
        enable(**{f"{'activation' if new else 'gradient'}_checkpointing_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise Misconfigured(f"checkpointing: {error}") from error
    model.train()


def _dealt(wanted: Wanted, name: str, task: Task, lengths: Sequence[int], unit: str, numbers: Sequence[int]) -> Dealt:
    """Rows dealt by the seed alone: the other tasks and what a row says do not matter."""
    judging = round(task.count * wanted.held)
    if min(judging, task.count - judging) < LEAST:
        raise Misconfigured(
            f"{name}: of its {task.count} rows {judging} would judge and {task.count - judging} drive (held = {wanted.held}); at least {LEAST} of each are needed"
        )
    shuffled = torch.randperm(task.count, generator=torch.Generator().manual_seed(wanted.seed)).tolist()
    judges = set(shuffled[:judging])
    order = in_order(lengths)
    return Dealt(name, task, [i for i in order if i not in judges], [i for i in order if i in judges], unit, numbers)


def _given(reference: str, directory: Path, device: torch.device) -> Given:
    """What the user's function returns, looked over."""
    module, _, name = reference.partition(":")
    with _theirs(reference):
        _imported(module)
    function = getattr(sys.modules[module], name, None)
    if not callable(function):
        raise Misconfigured(
            f"{reference}: {module} has {'no' if function is None else 'something else than a'} function {name}"
        )
    with _theirs(reference):
        found = function(directory, device)
    if not isinstance(found, tuple) or len(found) != len(Given._fields):
        raise Misconfigured(
            f"{reference} has to return a Given of a model and tasks, and returned {type(found).__name__}"
        )
    model, tasks = found
    if not isinstance(model, torch.nn.Module):
        raise Misconfigured(
            f"{reference} has to return a torch.nn.Module as the model, and returned {type(model).__name__}"
        )
    if not isinstance(tasks, Sequence) or not tasks:
        raise Misconfigured(f"{reference} has to return at least one task in a list, and returned {tasks!r}")
    for number, task in enumerate(tasks):
        count = getattr(task, "count", None)
        if not isinstance(count, int) or not callable(getattr(task, "losses", None)):
            raise Misconfigured(
                f"{reference}, task {number}: a task has a number `count` and a method `losses`, and {type(task).__name__} has not"
            )
    return Given(model, tasks)


@functools.cache
def _imported(name: str) -> dict[str, str]:
    """Imports a module of the user's, the current directory among the places it may be in, and returns its name and the
    digest of its source.

    Cached, as Python caches the module: a file that was changed since is not what runs.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
        told = _file(Path(spec.origin)) if spec is not None and spec.origin is not None and spec.has_location else None
        importlib.import_module(name)
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if told is None:
        raise Misconfigured(f"the module {name} has no source file whose digest could be kept")
    return told


def _file(file: Path) -> dict[str, str]:
    try:
        return {"name": file.name, "digest": f"blake3:{blake3(file.read_bytes()).hexdigest()}"}
    except OSError as error:
        raise Misconfigured(f"{file}: {error.strerror}") from None


@contextmanager
def _theirs(reference: str | None) -> Iterator[None]:
    """Turns what the user's code raises into Misconfigured."""
    try:
        yield
    except Misconfigured:
        raise
    except Exception as error:
        if reference is None:
            raise
        raise Misconfigured(f"{reference} raised {type(error).__name__}: {error}") from error
