"""The inputs of layers on rows of tasks, below `inputs/`: a directory a task, laid out as a generation is, that one
record names. They are of the base and of rows, and of no merge: the newest that were read are in force, whatever record
is read. FORMAT.md, *Inputs*."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

from continual.errors import Damaged, Misconfigured
from continual.records import Candidate, SlotSpec, TensorSpec
from continual.state import storing
from continual.state.durable import trouble
from continual.state.entries import InputsEntry, RepairEntry
from continual.state.format import TOGETHER, Format
from continual.state.generation import Generation
from continual.state.ledger import Ledger
from continual.state.parts import TaskInputs
from continual.state.protocol import OnStep
from continual.state.transaction import Transaction
from continual.stores import Where

DIRECTORY = "inputs"
SLOT = "inputs"
"""What is kept of a layer: `rank` rows, the largest eigenvalue first, and the diagonal in the last."""
_log = logging.getLogger("continual.state")


class KeptInputs(NamedTuple):
    """The inputs of one task, and the record that has them."""

    seq: int
    entry: InputsEntry
    task: TaskInputs

    @property
    def words(self) -> str:
        """The models that they are for."""
        return ",".join(self.task.models)


def in_force(ledger: Ledger) -> list[KeptInputs]:
    """The inputs of every task, newest record first. What was read again for models of the same words is gone, and
    what a repair found damaged."""
    found: list[KeptInputs] = []
    seen: set[tuple[str, ...]] = set()
    damaged: set[str] = set()
    for commit in (c for c in reversed(ledger.log) if c.kind in ("inputs", "repair")):
        if isinstance(entry := commit.entry, InputsEntry):
            tasks = [task for task in entry.tasks if task.models not in seen and task.id not in damaged]
            found += [KeptInputs(commit.seq, entry, task) for task in tasks]
            seen |= {task.models for task in entry.tasks}
        elif isinstance(entry, RepairEntry):
            damaged |= set(entry.inputs or ())
    return found


def of_model(kept: Collection[KeptInputs], candidate: Candidate, seq: int | None = None) -> KeptInputs | None:
    """The inputs of the task of a model, which was folded in record `seq`: the newest whose words name it."""
    return next((one for one in kept if any(names(word, candidate, seq) for word in one.task.models)), None)


def names(word: str, candidate: Candidate, seq: int | None = None) -> bool:
    """Whether a word names a model that was folded in record `seq`: its name, path, key, or record number, or a glob
    that its name matches."""
    return word == str(seq) or candidate.answers(word) or fnmatch.fnmatchcase(candidate.name, word)


def form_of(form: Format, rank: int, across: Collection[str]) -> Format:
    """The layout of what is kept of a task, of a state of this format."""
    slots = {
        layer.name: {SLOT: SlotSpec((rank + 1, length(layer, layer.name in across)))} if layer.kind == "matrix" else {}
        for layer in form.layers
    }
    return replace(form, version=TOGETHER, slots=slots)


def length(layer: TensorSpec, across: bool) -> int:
    """How long the inputs of a layer are: they meet its columns, or `across`, its rows."""
    return layer.shape[0] if across else math.prod(layer.shape[1:])


def begin(path: Where, form: Format, on_step: OnStep) -> Transaction:
    """Begins to write the inputs of one task of the state in `path`. Raises OSError, Retry and Halt."""
    directory = path / DIRECTORY
    if not directory.is_dir():
        directory.mkdir()
        storing.sync(path)
    on_step("begin")
    transaction = Transaction(directory, form, None, None, on_step)
    on_step("chunks")
    return transaction


def generation(path: Where, form: Format, kept: KeptInputs) -> Generation:
    """Where the inputs of a task are read, layer by layer, and checked as those of a generation are."""
    laid = form_of(form, kept.entry.rank, kept.entry.across)
    return Generation(path / DIRECTORY / kept.task.id, laid, kept.task.receipts)


@contextlib.contextmanager
def told(path: Where, kept: KeptInputs) -> Iterator[None]:
    """Says of inputs that are gone, or damaged, what to do."""
    again = f"'continual tune --what inputs' with --for {kept.words}"
    try:
        yield
    except Misconfigured:
        raise Misconfigured(
            f"{path}: the inputs of {kept.words} that record {kept.seq} names are not there any more: they were read "
            f"again meanwhile (then try again), or a repair moved them away (then read them again: {again})"
        ) from None
    except Damaged as error:
        raise Damaged(f"{error}; no fold depends on it: read the inputs again with {again}") from error


def unnamed(path: Where, ledger: Ledger) -> list[Where]:
    """What lies in `inputs/` and is not in force: what a writer left that died, and what was read again since. Raises
    OSError."""
    wanted = {one.task.id for one in in_force(ledger)}
    directory = path / DIRECTORY
    return [directory / name for name in storing.names(directory) if name not in wanted]


def clear(path: Where, ledger: Ledger) -> None:
    """Deletes what `unnamed` finds. What cannot be deleted now goes the next time, and the log has a line about it."""
    try:
        for entry in unnamed(path, ledger):
            storing.remove_tree(entry)
    except OSError as error:
        _log.warning("%s: old inputs stay until the state is next opened for writing: %s", path, trouble(error))


def findings(path: Where, form: Format, ledger: Ledger) -> dict[str, list[str]]:
    """What is wrong with the inputs in force, by the directory of each task of which they are not whole."""
    found = {}
    for kept in in_force(ledger):
        one = generation(path, form, kept)
        if not one.directory.is_dir():
            wrong = [f"{one.directory} is missing: the inputs of {kept.words}"]
        else:
            wrong = list(one.check(lambda: None))
        if wrong:
            found[kept.task.id] = wrong
    return found
