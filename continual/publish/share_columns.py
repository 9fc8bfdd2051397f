"""What each model has in a merge, as columns of a table for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHARES = 15
"""Models of a release whose shares a record keeps, and that a page shows."""


class ShareFigures(NamedTuple):
    """What a model has in the merge, as far as that is known: the share of the lengths of all task vectors (`norm`),
    the `cosine` with the merged one, and how much of that changes without it."""

    norm: float | None = None
    cosine: float | None = None
    change: float | None = None


UNKNOWN = ShareFigures()
_COLUMNS = (
    ("share", "{:.1%}", "of the lengths of all task vectors"),
    ("cosine", "{:+.3f}", "between the task vector and the merged one"),
    ("change", "{:.1%}", "of the merged task vector when the model is left out"),
)


class ShareColumns(NamedTuple):
    """The columns that are known of any model: their names, the cells of each row, and what they mean."""

    head: list[str]
    rows: list[list[str]]
    meaning: str

    @classmethod
    def of(cls, models: Sequence[ShareFigures]) -> ShareColumns:
        """The columns of a row for each model."""
        known = [number for number in range(len(_COLUMNS)) if any(one[number] is not None for one in models)]
        rows = [[_cell(one[number], _COLUMNS[number][1]) for number in known] for one in models]
        told = [f"*{_COLUMNS[number][0]}*: {_COLUMNS[number][2]}" for number in known]
        meaning = f"{'; '.join(told)}; `continual.json` has them by layer, too." if told else ""
        return cls([_COLUMNS[number][0] for number in known], rows, meaning)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
