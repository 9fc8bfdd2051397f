"""Tensors that a fold leaves as they are (ops/decisions/0040). A zero task vector changes no accumulator of any rule:
the files of the tensor are kept, and nothing of it is read but ‖X‖² as the fold before had it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from continual.engine.needs import on_device
from continual.executors.device import turn
from continual.lazily import torch
from continual.records import Totals
from continual.rules import Inputs, Rule, Sums
from continual.state.writing import Writing


def square_of(writing: Writing, rule: Rule, inputs: Inputs, totals: Totals, device: torch.device) -> float:
    """‖X‖² of the tensor of `inputs` before the fold, where an earlier version has kept none: the rule is asked to fold
    zeros. `totals` are those before. Raises Retry, Damaged."""
    spec = inputs.spec
    one, count = (spec.expert, spec.experts) if spec.kind == "stack" else (spec, 1)
    slots = rule.slots(one)
    parts: list[Sums] = []
    for values in writing.before(spec.name, count):
        kept = {slot: torch.from_numpy(value).view(slots[slot].shape) for slot, value in values.items()}
        with turn(device, on_device(rule, one)) as here:
            kept = {slot: value.to(here) for slot, value in kept.items()}
            tau = torch.zeros(one.shape, device=here)
            parts.append(rule.fold.apply(kept, tau, inputs._replace(spec=one), totals).sums)
    return Sums.total(parts).merged_sq


class Ahead:
    """The parts of a task vector in their order. Those at its beginning that are `nothing` are read ahead: that a
    fine-tune has a tensor and did not change it is found by reading it, and nothing is rewritten then."""

    def __init__(self, parts: Iterator[torch.Tensor], nothing: Callable[[torch.Tensor], bool]) -> None:
        self._parts = parts
        self._zeros = 0
        self._first = next(parts, None)
        while self._first is not None and nothing(self._first):
            self._zeros += 1
            self._first = next(parts, None)
        self.nothing = self._zeros > 0 and self._first is None

    def next(self, shape: Sequence[int]) -> torch.Tensor:
        """The next part, which has this shape."""
        if self._zeros:
            self._zeros -= 1
            return torch.zeros(tuple(shape))
        if self._first is not None:
            found, self._first = self._first, None
            return found
        return next(self._parts)

    def end(self) -> None:
        """Reads what comes after the last part: then all was hashed."""
        next(self._parts, None)
