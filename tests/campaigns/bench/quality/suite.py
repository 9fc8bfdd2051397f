"""What a suite is to the benchmark: tasks, one base, fine-tunes made by real training, and answers of a model to rows
of a task. No rule here.

A suite's folder holds `base/` and `FORM/TASK/`, ordinary model directories, each made once under a temporary name and
renamed into place.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Form = Literal["full", "lora", "shared", "seeded", "shuffled"]
Part = Literal["validation", "test"]
FORMS: tuple[Form, ...] = ("full", "lora")
"""What the quality benchmark merges unless told otherwise. `shared`: LoRA whose first factor is one and the same in all
adapters. `seeded`: LoRA whose first factors began as one and the same, as trainers with a fixed seed make them, and
were trained. `shuffled`: a full fine-tune on the same rows with their labels permuted, which learned noise."""


class Suite(Protocol):
    """A base, tasks in their published order, and how well weights answer them."""

    name: str
    folder: Path
    tasks: tuple[str, ...]

    def prepare(self) -> Path:
        """The base's directory, made if it is missing."""
        ...

    def train(self, task: str, form: Form, target: Path) -> None:
        """Trains a fine-tune of the base on the training rows of `task` and writes it to `target`."""
        ...

    def correct(self, weights: Mapping[str, Tensor], task: str, part: Part) -> Tensor:
        """For each row of that part, in order, whether a model with these weights is right (bool)."""
        ...


@runtime_checkable
class Watching(Protocol):
    """A suite that also says what a merge must not break."""

    def watch(self, weights: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, float]:
        """Figures of a model with these weights, in which `tasks` are merged, by name."""
        ...


def fine_tune(suite: Suite, task: str, form: Form) -> Path:
    """Directory of a fine-tune, trained if it is missing."""
    target = suite.folder / form / task
    once(target, lambda temporary: suite.train(task, form, temporary))
    return target


def once(target: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a directory beside `target` and renames it there; nothing where `target` exists. Where two
    processes want the same, one makes it, and the other waits."""
    if target.is_dir():
        return
    temporary, lock = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.lock")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not target.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
            write(temporary)
            temporary.rename(target)
        lock.unlink(missing_ok=True)
