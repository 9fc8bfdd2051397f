"""An objective that is a function of the user's, named as module:function: how it is imported and called, what it has
to return, and what becomes of what it raises."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.objectives.rows import file_digest
from continual.records import FileDigest


@runtime_checkable
class CalibrationTask(Protocol):
    """Rows of one task: `count` of them, numbered from 0."""

    count: int

    def losses(self, rows: Sequence[int]) -> Tensor:
        """The loss of each of these rows under the model's present weights: float, 1-D, differentiable."""
        ...


@runtime_checkable
class FittedTask(CalibrationTask, Protocol):
    """A task that fits something to the present weights before its losses mean much, such as the confidence of a
    classifier."""

    def fit(self, rows: Sequence[int]) -> Tensor:
        """Fits to these rows, for the calls of `losses` that follow. Returns the losses of these rows as fitted, in
        their order (float, 1-D); no gradient is kept.

        The gradient of `losses`, with what was fitted held, has to be that of the fitted loss. It is where the fit
        minimises the mean loss.
        """
        ...


@runtime_checkable
class ValuedTask(CalibrationTask, Protocol):
    """A task that says of each row what it is worth, more being better, where its loss says less: as a probability that
    moves with the share of rows that are right."""

    def worth(self, rows: Sequence[int]) -> Tensor:
        """What the model's present weights are worth on each of these rows (float, 1-D); no gradient is kept.
        `continual.objectives.shares_of_right` makes it of logits and classes."""
        ...


class Given(NamedTuple):
    """What a user's function returns: a model whose parameters are named as the base's tensors, and tasks that run
    it."""

    model: torch.nn.Module
    tasks: Sequence[CalibrationTask]


def is_function(objective: str) -> bool:
    """Whether the name of an objective is that of a function: module:function."""
    module, colon, function = objective.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call(reference: str, directory: Path, device: torch.device) -> Given:
    """Calls the function with the base's directory and the device. Raises Misconfigured where there is none, it raises,
    or it returns something else than a Given of a model and tasks."""
    module, _, name = reference.partition(":")
    with told_as_theirs(reference):
        _imported(module)
    function = getattr(sys.modules[module], name, None)
    if not callable(function):
        raise Misconfigured(
            f"{reference}: {module} has {'no' if function is None else 'something else than a'} function {name}"
        )
    with told_as_theirs(reference):
        found: object = function(directory, device)
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
                f"{reference}, task {number}: a task has a number `count` and a method `losses`, "
                f"and {type(task).__name__} has not"
            )
    return Given(model, tasks)


def code_digest(reference: str) -> FileDigest:
    """The file of the function's module and the digest of what runs. Raises Misconfigured where it cannot be imported,
    or has no source file."""
    with told_as_theirs(reference):
        return _imported(reference.partition(":")[0])


@contextmanager
def told_as_theirs(reference: str | None) -> Iterator[None]:
    """Turns what the code of the user's function raises into Misconfigured. Where there is none (None), exceptions
    pass."""
    try:
        yield
    except Misconfigured:
        raise
    except Exception as error:
        if reference is None:
            raise
        raise Misconfigured(f"{reference} raised {type(error).__name__}: {error}") from error


@functools.cache
def _imported(name: str) -> FileDigest:
    """Imports a module of the user's, looking in the current directory first, and returns the digest of its source.

    Cached, as Python caches the module: a file that was changed since is not what runs.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
        told = file_digest(Path(spec.origin)) if spec is not None and spec.origin and spec.has_location else None
        importlib.import_module(name)
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if told is None:
        raise Misconfigured(f"the module {name} has no source file whose digest could be kept")
    return told
