"""A rule with transforms before it, as one rule: each task vector goes through them, in their order, and then is
folded.

A transform, or the rule itself, may have to measure something of the whole model first. It sees each task vector as the
transforms before it leave it, so they measure one after the other. The place of a transform is its index in the list;
the place of the rule is the one after the last. `Inputs.measured` of a chain is a tuple with what was found for each
place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from continual.errors import Misconfigured
from continual.lazily import Tensor
from continual.records import TensorSpec, Totals
from continual.rules.before import TRANSFORMS, Transform
from continual.rules.contract import Accumulators, Counts, Folded, Inputs, Pass, Rule


def chain(rule: Rule, items: Sequence[Mapping[str, object]]) -> Rule:
    """`rule` with the transforms `items` (as `before.parse` gives them) before it; its options say so.

    Raises Misconfigured where one has to count over the whole model after one that needs whole tensors.
    """
    steps = tuple(TRANSFORMS[str(item["name"])].transform(item) for item in items)
    measures = (*(step.measure for step in steps), rule.needs.measure)
    _check([*(str(item["name"]) for item in items), f"rule {rule.name}"], steps, measures)
    by_runs = all(step.elementwise for step in steps)

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        found = inputs.measured if isinstance(inputs.measured, tuple) else measures
        tau = _transformed(steps, tau, inputs, found)
        return rule.fold.apply(accumulators, tau, _at(len(steps), inputs, found), totals)

    def workspace(spec: TensorSpec) -> int:
        return rule.fold.workspace(spec) + (0 if by_runs else 24 * spec.numel)

    def elementwise(spec: TensorSpec) -> bool:
        return by_runs and rule.fold.elementwise(spec)

    return rule._replace(
        # most transforms look at single elements, so there are no factors to read by
        factored=None,
        options={**rule.options, "before": [dict(item) for item in items]},
        fold=rule.fold._replace(apply=fold, workspace=workspace, elementwise=elementwise),
        needs=rule.needs._replace(
            seeded=rule.needs.seeded or any(step.seeded for step in steps),
            measure=ChainPass(steps, measures) if any(measures) else None,
            own=None if steps else rule.needs.own,  # what is left of τ is known once all of it is there
            ranks=False,  # what is left of a product of thin factors has any rank
        ),
    )


@dataclass(frozen=True)
class ChainPass(Pass):
    """The next pass of a chain: that of the first place which has one left. `found`: for each place its next pass, what
    it has found, or None."""

    steps: tuple[Transform, ...]
    found: tuple[object, ...]

    @property
    def share(self) -> float:
        return self._next[1].share

    @property
    def usual(self) -> float:
        return sum(left.usual for left in self.found if isinstance(left, Pass))

    @property
    def bins(self) -> int:
        return self._next[1].bins

    @property
    def _next(self) -> tuple[int, Pass]:
        return next((place, left) for place, left in enumerate(self.found) if isinstance(left, Pass))

    def tally(self, tau: Tensor, inputs: Inputs, counts: Counts, times: int) -> None:
        place, measure = self._next
        tau = _transformed(self.steps[:place], tau, inputs, self.found)
        measure.tally(tau, _at(place, inputs, self.found), counts, times)

    def conclude(self, counts: Counts, numel: int) -> object:
        place, measure = self._next
        found = (*self.found[:place], measure.conclude(counts, numel), *self.found[place + 1 :])
        return ChainPass(self.steps, found) if any(isinstance(left, Pass) for left in found) else found


def _check(names: Sequence[str], steps: Sequence[Transform], measures: Sequence[Pass | None]) -> None:
    """Raises Misconfigured if a place measures the whole model after a transform that needs whole tensors."""
    whole = next((place for place, step in enumerate(steps) if not step.elementwise), len(steps))
    for place in range(whole + 1, len(names)):
        if measures[place] is not None:
            raise Misconfigured(
                f"before: {names[place]} counts over the whole model and {names[whole]} needs whole tensors: "
                f"put {names[place]} first, or let it count per tensor"
            )


def _at(place: int, inputs: Inputs, found: Sequence[object]) -> Inputs:
    """What the transform or rule at this place is given."""
    return inputs._replace(measured=found[place], seed=inputs.seed + place)


def _transformed(steps: Sequence[Transform], tau: Tensor, inputs: Inputs, found: Sequence[object]) -> Tensor:
    for place, step in enumerate(steps):
        tau = step.apply(tau, _at(place, inputs, found))
    return tau
