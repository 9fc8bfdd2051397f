"""A model in memory, scored on calibration rows under one way of reading the merged model after the other. What is
good, the objective says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from continual.engine.reading import Reading
from continual.executors.contract import Executor, Task
from continual.lazily import torch
from continual.objectives.builtin import Rows
from continual.objectives.contract import Objective
from continual.objectives.parameters import HeldIn, Parameters
from continual.objectives.rows import file_digest
from continual.publish.exported_weights import merged
from continual.records import TensorSpec
from continual.state.parts import RowsEvaluation
from continual.tensors import BaseModel


@dataclass(frozen=True)
class OnRows:
    """What says how much a reading is worth on calibration rows. `held`: the parameters of the objective's model."""

    objective: Objective
    held: Parameters
    base: BaseModel
    executor: Executor

    def __call__(self, reading: Reading) -> float:
        return score(self.objective, self.held, self.base, reading, self.executor)


def score(objective: Objective, held: Parameters, base: BaseModel, reading: Reading, executor: Executor) -> float:
    """What the merged model that `reading` reads is worth. `held` are the parameters of the objective's model."""
    fill(held, base, reading, executor)
    return objective.score()


def fill(held: Parameters, base: BaseModel, reading: Reading, executor: Executor) -> None:
    """Sets the parameters to what an export of `reading` holds, tensor by tensor. What is not folded stays."""
    tasks = [
        Task(s.name, s.nbytes + 4 * s.numel + reading.need(s), partial(_set, held[s.name], base, reading, s))
        for s in base.specs
        if s.name in held
    ]
    for _ in executor.map(tasks):
        pass


def told(rows: Rows) -> RowsEvaluation:
    """What a record keeps of an objective: its name and batch, and its files by name and digest. Raises Misconfigured
    for a file that cannot be read."""
    heads = None if rows.heads is None else file_digest(rows.heads)
    return RowsEvaluation(rows.name, rows.batch, file_digest(rows.file), heads)


def _set(tensors: list[HeldIn], base: BaseModel, reading: Reading, spec: TensorSpec) -> None:
    value = torch.cat([piece.reshape(-1) for piece in merged(base, reading, spec, spec.dtype)]).view(spec.shape)
    with torch.no_grad():
        for held in tensors:
            held.value.copy_(value)
