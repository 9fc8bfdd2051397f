"""The fold rules and the transforms before them, as people and machines are told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from continual.rules import ROWS, TRANSFORMS, rule


@dataclass(frozen=True, slots=True)
class RuleInfo:
    """A fold rule as the registry has it. `options` are its fold-time options with their defaults, `order_free`: the
    order of the fine-tunes does not matter beyond rounding, `unfold`: one can be subtracted, `weighted`: a fine-tune
    can have a weight, `passes`: how often its tensors are read as a rule, `needs`: what it has to bring besides its
    weights, `scale`: how it is read by default."""

    name: str
    summary: str
    paper: str
    bytes_per_parameter: str
    order_free: bool
    unfold: bool
    weighted: bool
    passes: float
    needs: str
    scale: str
    options: Mapping[str, Any]


def rules() -> list[RuleInfo]:
    """Every fold rule."""
    return [
        RuleInfo(
            name=row.name,
            summary=row.summary,
            paper=row.paper,
            bytes_per_parameter=row.bytes_per_parameter,
            order_free=row.order_free,
            unfold=(made := rule(row.name)).combine is not None or made.rounds,
            weighted=made.weighted,
            passes=1 + (made.measure.usual if made.measure else 0.0),
            needs=made.shipped or "",
            scale=str(row.read),
            options={key: option.default for key, option in row.options.items()},
        )
        for row in ROWS.values()
    ]


@dataclass(frozen=True, slots=True)
class TransformInfo:
    """A transform of task vectors before a fold; `options` with their defaults."""

    name: str
    summary: str
    paper: str
    options: Mapping[str, Any]


def transforms() -> list[TransformInfo]:
    """Every transform that can stand before a rule."""
    return [
        TransformInfo(t.name, t.summary, t.paper, {key: option.default for key, option in t.options.items()})
        for t in TRANSFORMS.values()
    ]
