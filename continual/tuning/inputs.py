"""What layers of the base are given on rows of each task, read once: second moments, by which rules read that take them
(`regmean`). Nothing is folded, and how the merge is read stays as it is.

Of a layer with the inputs x, C = E[xxᵀ] over all inputs that it has on the rows, n×n. Kept are its diagonal and its
largest eigenvalues with their vectors, 4·(rank + 1)·n bytes; they are found as the inputs come, a few hundred at a
time, so that no n×n matrix is made of a wide layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from continual.config import CalibrationSettings
from continual.engine.engine import Engine
from continual.errors import Misconfigured
from continual.executors.contract import Progress
from continual.lazily import Tensor, torch
from continual.objectives import builtin
from continual.objectives.calibration import Calibration, load
from continual.objectives.parameters import find_parameters
from continual.objectives.wanted_losses import Wanted
from continual.outside import few
from continual.records import TensorSpec
from continual.state import Commit, State
from continual.state.keeping_inputs import InputsWriter, ReadInputs
from continual.state.task_inputs import length, names
from continual.tensors.layouts.in_classes import elsewhere

RANK = 64
"""Eigenvalues that are kept of a layer, unless told otherwise."""
_GLOB = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Which rows to run: of each task a JSONL file in `rows` (and a JSON file of prompts in `heads`, for the objective
    heads alone), and in `models` words that name its models. `objective`: causal-lm, classification, heads, or
    module:function, which brings the rows of its tasks itself. No row needs a label. `rank`: eigenvalues that are kept
    of a layer. `calibration`: `dtype`. `dry_run` records nothing.

    Raises Misconfigured naming what is missing or cannot be used.
    """

    objective: str
    models: tuple[tuple[str, ...], ...]
    rows: tuple[str | Path, ...] = ()
    heads: tuple[str | Path, ...] = ()
    rank: int = RANK
    calibration: Mapping[str, object] = field(default_factory=dict)
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise Misconfigured(f"rank = {self.rank}: at least one eigenvalue is kept of a layer")
        if not self.asked().by_function and len(self.models) != len(self.rows):
            raise Misconfigured(
                f"say for each file of rows whose task it is: there are {len(self.rows)} of --rows, and "
                f"{len(self.models)} of --for NAME,NAME"
            )

    def asked(self) -> Wanted:
        """The rows that are wanted, and what runs them. Raises Misconfigured."""
        kind = builtin.OBJECTIVES.get(self.objective)
        unlabelled = {"unsupervised": True} if kind is not None and kind.labelled else {}
        try:
            settings = CalibrationSettings.model_validate({"held": 0.5, **unlabelled, **self.calibration})
        except ValidationError as error:
            first = error.errors()[0]
            raise Misconfigured(f"{' '.join(map(str, first['loc']))}: {first['msg']}") from None
        rows, heads = (tuple(Path(file) for file in files) for files in (self.rows, self.heads))
        return Wanted(self.objective, rows, heads, settings)


@dataclass(frozen=True, slots=True)
class FoundInputs:
    """What was read: of each task words for its models, how many rows were run, how many inputs the layer had that had
    most, and bytes on disk. `lacking`: layers that the state keeps and that are no linear layer in the class that was
    run; a rule that reads by inputs reads them as the mean. `commit`: the record; None of a dry run."""

    tasks: tuple[tuple[tuple[str, ...], int, int, int], ...]
    layers: int
    lacking: tuple[str, ...]
    rank: int
    seconds: float
    commit: Commit | None


def read_inputs(engine: Engine, wanted: TaskRows, progress: Progress) -> FoundInputs:
    """Runs the base on the rows of every task, one after the other, and records what its layers are given. Raises
    Misconfigured where the rows or the objective cannot be used, or a word names no model of the merge, Retry and Halt;
    then nothing is recorded."""
    started, state = time.perf_counter(), engine.state
    objective = wanted.asked()
    told = objective.told()
    _check_words(state, wanted.models)
    losses = load(objective, engine.base.checkpoint.directory, engine.device)
    if len(wanted.models) != len(losses.dealt):
        raise Misconfigured(
            f"{wanted.objective} has {len(losses.dealt)} tasks: say of each whose it is, {len(wanted.models)} times "
            "--for NAME,NAME was said"
        )
    layers = _Layers(engine, losses, wanted.rank)
    if not layers.places:
        raise Misconfigured(
            f"none of the layers that {state.path} keeps is a linear layer of {type(losses.model).__name__}: take "
            "another objective, whose class has them"
        )
    with ExitStack() as held:
        writer = None if wanted.dry_run else held.enter_context(InputsWriter(state, wanted.rank, layers.across))
        tasks, done, rows = [], 0, sum(len(task.drive) + len(task.judge) for task in losses.dealt)
        progress("inputs", 0, rows)
        for models, task in zip(wanted.models, losses.dealt, strict=True):
            with layers.listening() as heard:
                for _ in losses.each_alone(task):
                    done += 1
                    progress("inputs", done, rows)
            found = {name: one.kept().numpy() for name, one in heard.items()}
            if not (most := max(one.count for one in heard.values())):  # one expert alone may be asked by no row
                raise Misconfigured(f"{task.name}: its rows reach no linear layer of the model")
            count, nbytes = len(task.drive) + len(task.judge), sum(values.nbytes for values in found.values())
            tasks.append((models, count, most, nbytes))
            if writer is not None:
                writer.write(ReadInputs(models, count, most, found))
        seconds = time.perf_counter() - started
        commit = None if writer is None else writer.record(told, len(layers.places), seconds)
    return FoundInputs(tuple(tasks), len(layers.places), layers.lacking, wanted.rank, seconds, commit)


def _check_words(state: State, models: Sequence[Sequence[str]]) -> None:
    """Raises Misconfigured for a word that names no model of the merge, unless it is a glob, which later ones may
    match, and for a model of two tasks."""
    folds = state.ledger.folds()
    owner: dict[str, int] = {}
    for number, words in enumerate(models):
        if not words or not all(words):
            raise Misconfigured("--for: write names of models, as alice,bob or a glob")
        for word in words:
            mine = [fold.entry.candidate for fold in folds if names(word, fold.entry.candidate, fold.seq)]
            if not mine and not _GLOB & set(word):
                there = few(fold.entry.candidate.name for fold in folds) or "nothing"
                raise Misconfigured(f"--for {word}: no model of the merge is called so; in it are {there}")
            for candidate in mine:
                if owner.setdefault(candidate.key, number) != number:
                    raise Misconfigured(f"--for {word}: {candidate.name} is of another task already")


class _Layers:
    """The linear layers of a model in memory that hold tensors of a base. `across`: those whose weights lie in × out;
    `lacking`: matrices of the state that are none of them."""

    def __init__(self, engine: Engine, losses: Calibration, rank: int) -> None:
        base = engine.base
        there = [spec for spec in base.specs if spec.kind == "carried" or spec.name in base.checkpoint.tensors]
        held = find_parameters(losses.model, there, base.aliases, elsewhere(base))
        matrices = {spec.name: spec for spec in base.specs if spec.kind == "matrix"}
        whole = {id(one.tensor): name for name in matrices for one in held.get(name, ()) if one.spot is None}
        self.places: dict[str, list[torch.nn.Module]] = {}
        self.across: set[str] = set()
        for module in losses.model.modules():
            kind, weight = type(module).__name__, getattr(module, "weight", None)
            if id(weight) not in whole or not (isinstance(module, torch.nn.Linear) or kind == "Conv1D"):
                continue
            self.places.setdefault(whole[id(weight)], []).append(module)
            if kind == "Conv1D":  # of transformers, in × out
                self.across.add(whole[id(weight)])
        self.lacking = tuple(sorted(matrices.keys() - self.places.keys()))
        self._specs: dict[str, TensorSpec] = matrices
        self._rank = rank

    def listening(self) -> _Heard:
        """The moments of each layer, from here on until the block is left."""
        found = {name: _Moment(length(self._specs[name], name in self.across), self._rank) for name in self.places}
        return _Heard(found, self.places)


class _Heard:
    """Moments of layers that hear what the layers are given. A context manager."""

    def __init__(self, moments: Mapping[str, _Moment], places: Mapping[str, Sequence[torch.nn.Module]]) -> None:
        self._moments, self._places, self._hooks = moments, places, ExitStack()

    def __enter__(self) -> Mapping[str, _Moment]:
        for name, modules in self._places.items():
            for module in modules:
                hook = module.register_forward_pre_hook(partial(_heard, self._moments[name]))
                self._hooks.callback(hook.remove)
        return self._moments

    def __exit__(self, *_: object) -> None:
        self._hooks.close()


def _heard(moment: _Moment, _module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
    moment.add(given[0].detach().flatten(0, -2))


class _Moment:
    """C of one layer of n inputs, as they come: its diagonal, and the `rank` largest eigenvalues with their vectors. Of
    a narrow layer all of it is there until the end."""

    def __init__(self, n: int, rank: int) -> None:
        self.count = 0
        self._n, self._rank, self._wide = n, rank, min(n, 3 * rank)
        self._diagonal = torch.zeros(n, dtype=torch.float64)
        self._rows = torch.zeros(0, n, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """More inputs, N×n."""
        exact = inputs.cpu().double()
        self.count += len(exact)
        self._diagonal += exact.square().sum(0)
        self._waiting.append(exact.float())
        if sum(map(len, self._waiting)) >= 2 * self._wide:
            self._rows, self._waiting = self._largest(self._wide), []

    def kept(self) -> Tensor:
        """(rank + 1)×n float32: rows whose products with themselves add up to C, and its diagonal."""
        found = torch.zeros(self._rank + 1, self._n, dtype=torch.float64)
        rows = self._largest(self._rank)
        found[: len(rows)], found[-1] = rows, self._diagonal
        found[:-1] /= max(1, self.count) ** 0.5
        found[-1] /= max(1, self.count)
        return found.float()

    def _largest(self, count: int) -> Tensor:
        """√λ·vᵀ of the largest `count` eigenvalues of what is there, largest first."""
        rows = torch.cat([self._rows, *(one.double() for one in self._waiting)])
        if len(rows) <= self._n:
            values, vectors = torch.linalg.eigh(rows @ rows.mT)
            found = vectors.mT @ rows
        else:
            values, vectors = torch.linalg.eigh(rows.mT @ rows)
            found = values.clamp(min=0).sqrt()[:, None] * vectors.mT
        largest: Tensor = found.flip(0)[:count]
        return largest
