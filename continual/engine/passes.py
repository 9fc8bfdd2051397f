"""The passes over a candidate before any of it is folded: what a rule counts over the whole model, or over a tensor
that it would else need whole. What is counted is the rule's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from continual.executors.contract import Progress
from continual.records import TensorSpec
from continual.rules import LARGE, Counts, Inputs, Pass, Rule
from continual.tensors import TaskVectors


def by_runs(rule: Rule, spec: TensorSpec) -> bool:
    """Whether a tensor goes through the rule in runs, perhaps after passes of its own."""
    return rule.fold.elementwise(spec) or _has_own(rule, spec)


def seen_alone(rule: Rule, spec: TensorSpec) -> float:
    """How often the elements of a tensor are read in passes of its own, as a rule; 0 where it has none."""
    return rule.needs.own.usual if rule.needs.own is not None and _has_own(rule, spec) else 0.0


def _has_own(rule: Rule, spec: TensorSpec) -> bool:
    large = spec.numel > LARGE and spec.kind != "stack"
    return rule.needs.own is not None and large and not rule.fold.elementwise(spec)


Tally = Callable[[Mapping[str, Pass]], Iterator[tuple[str, Counts]]]
"""Makes a pass over each tensor of these names; what was counted, as it comes."""


def of_model(found: object, changed: Sequence[str], numel: int, tally: Tally, progress: Progress) -> object:
    """What passes over the tensors `changed` of a model of `numel` elements find, `found` being the first of them;
    itself where it is none. Counts are whole numbers, so the order in which tensors end does not matter. Raises Refuse,
    Retry, Abandoned."""
    number = 0
    while isinstance(found, Pass):
        number += 1
        counts = np.zeros(found.bins, np.int64)
        for done, (_, part) in enumerate(tally(dict.fromkeys(changed, found)), 1):
            counts += part
            progress(f"measure {number}", done, len(changed))
        found = found.conclude(counts, numel)
    return found


def of_tensors(rule: Rule, changed: Sequence[TensorSpec], tally: Tally, progress: Progress) -> Mapping[str, object]:
    """What the rule finds by passes over each tensor by itself, by name, of those that it would else need whole and
    that are too large for that. Raises as `of_model`."""
    specs = {spec.name: spec for spec in changed if _has_own(rule, spec)}
    found: dict[str, object] = dict.fromkeys(specs, rule.needs.own)
    number = 0
    while left := {name: each for name, each in found.items() if isinstance(each, Pass)}:
        number += 1
        for done, (name, counts) in enumerate(tally(left), 1):
            found[name] = left[name].conclude(counts, specs[name].numel)
            progress(f"measure {number}", done, len(left))
    return found


def counts_of(vectors: TaskVectors, inputs: Inputs, measure: Pass) -> Counts:
    """What a pass counts in one tensor, on the share of its elements that the pass has to see; `inputs` are what the
    rule is given besides the task vector. Raises Refuse, Retry."""
    counts = np.zeros(measure.bins, np.int64)
    spec = inputs.spec
    for start, stop, tau in vectors.runs(spec.name, None, share=measure.share):
        stands_for = round(min(vectors.run, spec.numel - start) / (stop - start))
        measure.tally(tau, inputs._replace(start=start), counts, stands_for)
    return counts


def pass_need(vectors: TaskVectors, name: str) -> int:
    """Peak bytes of a pass over one tensor."""
    return vectors.nbytes(name, whole=False) + 8 * 4 * vectors.run
