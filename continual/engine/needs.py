"""How many bytes folding takes, of memory and on the disk."""

from __future__ import annotations

from collections.abc import Sequence

from continual.engine.passes import by_runs
from continual.records import TensorSpec
from continual.rules import Rule
from continual.tensors import TaskVectors


def on_device(rule: Rule, spec: TensorSpec) -> int:
    """Bytes that folding one tensor takes on an accelerator: the task vector, the accumulators before and after, and
    what the rule works with."""
    return 4 * spec.numel + 2 * sum(slot.nbytes for slot in rule.slots(spec).values()) + rule.fold.workspace(spec)


def need(rule: Rule, spec: TensorSpec, vectors: TaskVectors | None) -> int:
    """Bytes that folding one tensor takes at its peak; of a stack, its largest part in memory at a time. Without
    `vectors` it is a tensor that the candidate leaves as it is."""
    part = spec.expert if spec.kind == "stack" else spec
    if vectors is None:
        return 4 * part.numel + sum(slot.nbytes for slot in rule.slots(part).values()) + rule.fold.workspace(part)
    if part is not spec and not by_runs(rule, spec):
        kept = sum(slot.nbytes for slot in rule.slots(part).values())
        moments = 4 * part.numel if rule.needs.shipped is not None else 0
        return vectors.nbytes(spec.name, whole=False) + 4 * part.numel + moments + kept + rule.fold.workspace(part)
    slots = rule.slots(spec).values()
    if by_runs(rule, spec):
        share = min(1.0, vectors.run / max(1, spec.numel))
        works = rule.fold.workspace(spec) * (1.0 if rule.fold.elementwise(spec) else share)
        return vectors.nbytes(spec.name, whole=False) + int(share * sum(slot.nbytes for slot in slots) + works)
    return vectors.nbytes(spec.name) + sum(slot.nbytes for slot in slots) + rule.fold.workspace(spec)


def state_bytes(rule: Rule, specs: Sequence[TensorSpec]) -> int:
    """Bytes of what is kept of these tensors, without metadata."""
    return sum(slot.nbytes for spec in specs if spec.kind != "carried" for slot in rule.slots(spec).values())
