"""Writing the inputs of layers on rows of tasks into a state: each task's directory whole and on disk, then one record
that names all of them, then what was read before for the same models goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from continual.errors import Misconfigured
from continual.records import ObjectiveRecord
from continual.state import task_inputs
from continual.state.arrays import Array
from continual.state.durable import environment
from continual.state.entries import InputsEntry
from continual.state.format import Commit
from continual.state.parts import TaskInputs
from continual.state.store import State
from continual.state.transaction import Transaction, room


@dataclass(frozen=True, slots=True)
class ReadInputs:
    """What was read on the rows of one task: words for its models, how many rows and inputs of a layer, and of each
    layer its factor and its diagonal below it, (rank + 1)×n float32."""

    models: tuple[str, ...]
    rows: int
    vectors: int
    layers: Mapping[str, Array]


class InputsWriter:
    """Writes the inputs of tasks, one after the other, into a state that is open for writing. A context manager: what
    no record names when it is left is dropped."""

    def __init__(self, state: State, rank: int, across: Collection[str]) -> None:
        """Raises Misconfigured where the state keeps no adapters."""
        state.must_be_writable()
        if state.format.form is None:
            raise Misconfigured(
                f"{state.path} keeps a merge of whole tensors, and what reads by inputs needs every model apart: only "
                "a state made with 'continual init --adapters' keeps them"
            )
        self._state, self._rank, self._across = state, rank, tuple(sorted(across))
        self._form = task_inputs.form_of(state.format, rank, across)
        self._open = ExitStack()
        self._written: list[tuple[Transaction, TaskInputs]] = []

    def __enter__(self) -> InputsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, found: ReadInputs) -> None:
        """The inputs of one task. Raises Retry and Halt."""
        nbytes = sum(values.nbytes for values in found.layers.values())
        room(self._state.path, nbytes, "reading inputs")
        with environment("cannot write the inputs"):
            begun = task_inputs.begin(self._state.path, self._form, self._state.on_step)
        writing = self._open.enter_context(begun)
        for name, values in found.layers.items():
            writing.write(name, task_inputs.SLOT, values)
        generation = writing.sync()
        task = TaskInputs(
            id=writing.id,
            receipts=generation.checksum,
            models=found.models,
            rows=found.rows,
            vectors=found.vectors,
            nbytes=nbytes,
        )
        self._written.append((writing, task))

    def record(self, objective: ObjectiveRecord, layers: int, seconds: float) -> Commit:
        """One record of all that was written. Raises Retry and Halt; then nothing has changed."""
        tasks = tuple(task for _, task in self._written)
        entry = InputsEntry(
            objective=objective,
            rank=self._rank,
            layers=layers,
            across=self._across,
            tasks=tasks,
            seconds=round(seconds, 3),
            message=f"the inputs of {layers} layers on {sum(task.rows for task in tasks)} rows, for "
            + "; ".join(",".join(task.models) for task in tasks),
        )
        try:
            commit = self._state.record(entry)
        finally:  # whatever fails once the record stands, it names these
            named = {one.task.id for one in task_inputs.in_force(self._state.ledger)}
            for writing, task in self._written:
                if task.id in named:
                    writing.committed()
        task_inputs.clear(self._state.path, self._state.ledger)
        return commit
