"""Keeps out task vectors whose length fits neither the base nor what was folded before, as a whole or in one layer.

The page on rules (ops/docs/rules.md) says how long the task vectors of honest fine-tunes are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Doubt, Earlier, Numbers

FEW = 5
"""With fewer models in the merge nothing is known of how far their lengths lie apart."""
_NARROW, _WIDE = 0.625, 2.0
"""Of many the band is between these multiples of `max_mean_ratio`. Honest full fine-tunes of one recipe lie within a
factor 2.1 of each other, adapters 2.7; two decades of learning rates make lengths up to 14 times the median."""
_SHORTEST, _CROWD = 12.5, 6
"""A task vector that is shorter than the band says does no harm alone, however short it is: of one beside six others
nothing is to be seen. Six of them make the whole merge shorter, and cost 7 points (tests/campaigns/other_lengths.py).
So one of `_CROWD` may be, up to `_SHORTEST` times `max_mean_ratio`, beyond which nothing of it is left. What is short
is said by the others: one that is let in must not move the line."""


@dataclass(frozen=True)
class NormsGate(AtNumbers, Doubt):
    """Refuses a task vector that is zero, or too long, or too short.

    `max_base_ratio`: largest ‖τ‖/‖θ₀‖; a model that has nothing to do with the base has 1 and more. `max_mean_ratio`: a
    task vector may be so many times longer or shorter than the median of those in the merge; where these are five or
    more, the band follows how far apart they lie, from a factor 5 to 16. One of six may be up to 100 times shorter,
    and any where fewer than five are there: nobody knows yet how far apart lengths lie, and whether the first was too
    long. In a group of layers it may be so many times longer than the median of those that change these layers, and no
    longer than the base there.
    """

    name = "norms"
    reasons = ("zero", "norm-base", "norm-mean", "norm-layer")
    shared = ("max_base_ratio", "max_mean_ratio")

    max_base_ratio: float = 0.9
    max_mean_ratio: float = 8.0

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `zero` if τ is zero everywhere, `norm-base`, `norm-mean`, `norm-layer`."""
        norm = seen.tau_norm
        if norm == 0.0:
            raise Refuse(
                "zero",
                f"{seen.name}: the task vector is zero everywhere: it is the base itself, or an adapter that was saved "
                "before it was trained",
            )
        base = seen.base_norm
        if base is not None and norm > self.max_base_ratio * base:
            raise Refuse(
                "norm-base",
                f"{seen.name}: the task vector's norm {norm:.4g} is {norm / base if base else math.inf:.3g} times "
                f"the base's ({base:.4g}), more than max_base_ratio = {self.max_base_ratio:g}: "
                "a fine-tune of another base, or a damaged one; if it is neither, set a larger max_base_ratio",
                by=("max_base_ratio",),
            )
        if earlier := [one for one in seen.earlier() if one.tau_norm > 0]:
            self._beside(seen, earlier)
        self._by_layer(seen, earlier)

    def _beside(self, seen: Numbers, earlier: Sequence[Earlier]) -> None:
        norms = [one.tau_norm for one in earlier]
        middle, norm = median(norms), seen.tau_norm
        limit = band(norms, self.max_mean_ratio)
        others = sorted(norms)[len(norms) // _CROWD :]  # those that may be short are not to make room for more of them
        least = median(others) / min(limit, band(others, self.max_mean_ratio))
        short = sum(one < least for one in norms)
        crowded = len(norms) >= FEW and (short + 1) * _CROWD > len(norms) + 1
        shortest = least if crowded else middle / (_SHORTEST * self.max_mean_ratio)
        if norm > limit * middle or norm < shortest:
            said = "" if limit == self.max_mean_ratio else f" ({limit:.3g} by how far apart these lie)"
            if norm < middle and crowded and norm * _SHORTEST * self.max_mean_ratio >= middle:
                said += f", as {short} of these are, and one of {_CROWD} may be so short"
            raise Refuse(
                "norm-mean",
                f"{seen.name}: the task vector's norm {norm:.4g} is {norm / middle:.3g} times the median of the "
                f"{len(norms)} in the merge ({middle:.4g}), outside max_mean_ratio = {self.max_mean_ratio:g}"
                f"{said}; if it is meant to be so, set a larger max_mean_ratio",
                by=("max_mean_ratio",),
            )

    def _by_layer(self, seen: Numbers, earlier: Sequence[Earlier]) -> None:
        if seen.sketch is None:
            return
        mine = seen.sketch.norms
        sketches = [
            one.sketch.norms for one in earlier if one.sketch is not None and len(one.sketch.norms) == len(mine)
        ]
        for group, norm in enumerate(mine):
            where = f"{seen.name}: in layer group {group + 1} of {len(mine)} the task vector's norm {norm:.4g} is"
            longest = max(1.0, self.max_base_ratio)
            if seen.layer_norms and norm > longest * seen.layer_norms[group] > 0:
                raise Refuse(
                    "norm-layer",
                    f"{where} {norm / seen.layer_norms[group]:.3g} times the base's there, more than "
                    f"{longest:g} (max_base_ratio = {self.max_base_ratio:g}): one layer is damaged, permuted or was "
                    "put in by somebody; if it is none of these, set a larger max_base_ratio",
                    by=("max_base_ratio",),
                )
            known = [norms[group] for norms in sketches if norms[group] > 0]
            limit = band(known, self.max_mean_ratio) if known else math.inf
            if known and norm > limit * median(known) and seen.sketch.share(group) > _SHARE:
                raise Refuse(
                    "norm-layer",
                    f"{where} {norm / median(known):.3g} times the median of the {len(known)} models that change these "
                    f"layers ({median(known):.4g}), outside max_mean_ratio = {self.max_mean_ratio:g}: one layer is "
                    "damaged or was put in by somebody; if it is meant to be so, set a larger max_mean_ratio",
                    by=("max_mean_ratio",),
                )


_SHARE = 0.05
"""Of ‖τ‖²: a layer with less cannot move much, however it compares with the same layer of others."""


def band(norms: Sequence[float], ratio: float) -> float:
    """How many times longer or shorter than the median of these norms one more may be: `ratio` of a few; of more, three
    standard deviations of their logarithms, by the median deviation, from 0.625 to 2 times `ratio`."""
    if len(norms) < FEW:
        return ratio
    logs = [math.log(norm) for norm in norms]
    middle = median(logs)
    apart = 1.4826 * median(abs(one - middle) for one in logs)
    return min(_WIDE * ratio, max(_NARROW * ratio, math.exp(min(3.0 * apart, 700.0))))
