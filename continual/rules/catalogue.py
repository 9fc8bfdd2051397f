"""The fold rules and the transforms before them, as `continual rules` tells people and machines of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from continual.rules import ROWS, TRANSFORMS, Option, Rule, RuleRow, readings, terms_of
from continual.rules.options import O


@dataclass(frozen=True, slots=True)
class RuleInfo:
    """A fold rule of the list.

    `order_free`: the order of the fine-tunes does not matter beyond rounding. `unfold`: one can be subtracted.
    `combine`: two states of it can be added.
    `weighted`: a fine-tune can have a weight. `passes`: how often its tensors are usually read. `needs`: the file that
    it has to bring besides its weights; `inputs`, those of layers on rows of its task; or nothing. `scale`: how the
    merge is read by default. `options`: the fold-time options with their defaults. `readings`: the rules that a state
    of whole tensors made with it can be read by. `adapters`: how it reads a state that keeps adapters: `factors`, an
    adapter again; `dense`, whole tensors; or nothing where it cannot. `terms`: the states (`adapters`, `tensors`) of
    which it reads a sum with a term of each model, so that each can have a coefficient in each layer.
    """

    name: str
    summary: str
    paper: str
    bytes_per_parameter: str
    order_free: bool
    unfold: bool
    combine: bool
    weighted: bool
    passes: float
    needs: str
    scale: str
    options: Mapping[str, object]
    readings: tuple[str, ...]
    adapters: str
    terms: tuple[str, ...]


def rules() -> list[RuleInfo]:
    """Every fold rule."""
    return [_info(row, row.rule()) for row in ROWS.values()]


def _info(row: RuleRow[O], made: Rule) -> RuleInfo:
    return RuleInfo(
        name=row.name,
        summary=row.summary,
        paper=row.paper,
        bytes_per_parameter=row.bytes_per_parameter,
        order_free=made.laws.order_free,
        unfold=made.laws.combine is not None or made.laws.rounds,
        combine=made.laws.combine is not None and not made.laws.rounds,
        weighted=made.laws.weighted,
        passes=1 + (made.needs.measure.usual if made.needs.measure else 0.0),
        needs="inputs" if made.needs.inputs else made.needs.shipped or "",
        scale=str(row.read),
        options=_defaults(row.declared),
        readings=tuple(readings(made)),
        adapters="" if row.name not in readings(made, blocks=True) else "factors" if made.factored else "dense",
        terms=tuple(kind for kind in ("adapters", "tensors") if terms_of(made, blocks=kind == "adapters")),
    )


def _defaults(options: Mapping[str, Option]) -> dict[str, object]:
    return {name: option.default for name, option in options.items()}


@dataclass(frozen=True, slots=True)
class TransformInfo:
    """A transform of task vectors before a fold; `options` with their defaults."""

    name: str
    summary: str
    paper: str
    options: Mapping[str, object]


def transforms() -> list[TransformInfo]:
    """Every transform that can stand before a rule."""
    return [
        TransformInfo(name=row.name, summary=row.summary, paper=row.paper, options=_defaults(row.declared))
        for row in TRANSFORMS.values()
    ]
