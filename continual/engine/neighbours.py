"""What the gates are told of the models that are in the merge, and of what a person said of the candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache, partial

from continual.engine.outcomes import FoldReport, OpenCandidate
from continual.engine.paired import paired
from continual.gates import Earlier, Numbers
from continual.records import Totals
from continual.state import State
from continual.state.entries import RetryEntry
from continual.state.ledger import Ledger
from continual.state.parts import SketchText
from continual.tensors import BaseModel
from continual.tensors.vectors.sketch import Sketch, SketchPlan


def numbers_of(report: FoldReport, opened: OpenCandidate, state: State, base: BaseModel, before: Totals) -> Numbers:
    """What the gates judge of a candidate that was folded on the totals `before` and is not committed."""
    plan = SketchPlan.of(spec for spec in base.specs if spec.kind != "carried")
    found, squares = report.numbers, state.format.base.squares
    sums = [0.0] * plan.groups
    for name, group in plan.group.items():
        sums[group] += squares.get(name, 0.0)
    return Numbers(
        report.candidate.name,
        found.tau_norm,
        found.base_norm,
        before,
        report.cut,
        report.sketch,
        found.stands_out,
        tuple(map(math.sqrt, sums)) if squares else (),
        cache(partial(earlier, state.ledger, report.candidate.origin)),  # several gates ask
        accepted(state.ledger, report.candidate.key),
        found.cosine,
        found.met.cosines if found.met else (),
        cache(partial(paired, base, opened, squares, report.squares)),
        report.grids,
    )


def earlier(ledger: Ledger, origin: str) -> Sequence[Earlier]:
    """The models in the merge now, the oldest first, as a candidate from `origin` is compared with them."""
    folds = [fold.entry for fold in ledger.folds()]
    return [
        Earlier(one.candidate.name, one.numbers.tau_norm, _sketch(one.numbers.sketch), one.candidate.origin == origin)
        for one in folds
    ]


def accepted(ledger: Ledger, key: str) -> bool:
    """Whether a person said that the candidate `key` is to be folded in spite of doubts."""
    last = ledger.asked(key)
    return last is not None and isinstance(last.entry, RetryEntry) and last.entry.because is not None


@lru_cache(maxsize=1 << 14)  # a record's sketch does not change, and every fold asks for those of all in the merge
def _sketch(kept: SketchText | None) -> Sketch | None:
    return None if kept is None else Sketch.read(kept.norms, kept.values)
