"""Text that must stay: what the model predicts of it at the start is kept, and how far what it predicts later is from
that is said of each row. No answer of a task is part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from continual.objectives.function import CalibrationTask
from continual.objectives.taught import Said

ROWS = 32
"""Prompts of so many rows at most drive, and of as many judge, shared out among the tasks: each has many tokens, and a
pass over them costs as much as one over their answers."""


@runtime_checkable
class PromptedTask(CalibrationTask, Protocol):
    """A task of a language model whose rows have text before the answer."""

    def prompts(self, rows: Sequence[int]) -> Said:
        """What the model predicts, under its present weights, of the tokens of these rows that come before the answer;
        differentiable. Of a row without a prompt nothing."""
        ...


class Prompts:
    """The prompts of a task as rows of their own, which a model can be asked about."""

    def __init__(self, of: PromptedTask) -> None:
        self._of, self.count = of, of.count

    def says(self, rows: Sequence[int]) -> Said:
        """As `prompts` of the task."""
        return self._of.prompts(rows)


def thinned(rows: Sequence[int], most: int) -> list[int]:
    """At most so many of these, evenly, in their order."""
    return [rows[place * len(rows) // most] for place in range(most)] if len(rows) > most else list(rows)
