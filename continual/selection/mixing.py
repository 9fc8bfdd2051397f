"""A merged model that is a weighted sum of task vectors, X = Σ_i w_i τ_i, made from the one before it: X' = keep·X +
Σ_i add_i τ_i, layer by layer. Only the models whose weight changes are read.

Models whose files are gone, or that are not weighed any more, are in X together. Of these a share is kept; none is
added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from continual import linalg
from continual.engine.engine import Engine
from continual.engine.needs import need
from continual.executors.contract import Progress, Task
from continual.lazily import Tensor, torch
from continual.records import TensorSpec, depths_of
from continual.rules.sums import SLOT
from continual.selection.members import Member, Opened, opened
from continual.state import State, Transaction
from continual.tensors import BaseModel
from continual.tensors.vectors.added import Content

NOTHING = 1e-15
"""Weights below this are rounding."""
GROWS = 2.0
"""X is multiplied by this at most. The rounding of X grows with the factor, which would be large where a model goes
from next to nothing to much."""


def layers(base: BaseModel, *, by_layer: bool) -> dict[str, int]:
    """The number of the layer of each tensor that is folded; 0 for all where models are weighed whole."""
    specs = [spec for spec in base.specs if spec.kind != "carried"]
    depths = depths_of(specs)
    return {spec.name: depths.index(spec.depth) if by_layer else 0 for spec in specs}


class Mix(NamedTuple):
    """By layer: the share of X that is kept, and, by key, what is added of each member's task vector."""

    keep: tuple[float, ...]
    add: Mapping[str, tuple[float, ...]]


def mix(before: Tensor, after: Tensor, rest: Sequence[float], keys: Sequence[str]) -> Mix:
    """What makes a sum with the weights `after` from one with the weights `before` (vertices × layers, float64).

    Row i is the weight of the member `keys[i]`. Where there is a `rest` in X that no member accounts for, the last row
    is its weight, and decides what is kept of a layer. Elsewhere that is the share which leaves the fewest members to
    read.
    """
    members = len(keys)
    keep: list[float] = []
    add = torch.zeros(members, before.shape[1], dtype=torch.float64)
    for layer in range(before.shape[1]):
        old, new = before[:members, layer], after[:members, layer]
        if rest:
            share = float(after[-1, layer] / before[-1, layer]) if float(before[-1, layer]) > 0 else 0.0
        else:
            ratios = [float(new[i] / old[i]) for i in range(members) if old[i] > 0]
            shares = sorted({0.0, *(ratio for ratio in ratios if ratio <= GROWS)}, reverse=True)
            share = min(shares, key=lambda share: int(((new - share * old).abs() > NOTHING).sum()))
        keep.append(share)
        add[:, layer] = new - share * old
    add[add.abs() <= NOTHING] = 0.0
    return Mix(tuple(keep), {key: tuple(add[i].tolist()) for i, key in enumerate(keys) if bool(add[i].any())})


def stored_sum(state: State) -> Callable[[TensorSpec], Tensor]:
    """Reads X of a state whose merged model is a weighted sum: the tensor of a spec, float32, in new memory."""
    return lambda spec: torch.from_numpy(state.read(spec.name, SLOT))


class Mixing:
    """Makes weighted sums of `members`. `merged` reads X, a tensor at a time, in new memory; `layers` numbers the layer
    of each tensor."""

    def __init__(
        self,
        engine: Engine,
        merged: Callable[[TensorSpec], Tensor],
        members: Mapping[str, Member],
        layers: Mapping[str, int],
    ) -> None:
        self._engine = engine
        self._merged = merged
        self._members = members
        self._layers = layers
        self._specs = [spec for spec in engine.base.specs if spec.kind != "carried"]

    def need(self, spec: TensorSpec) -> int:
        """Peak bytes of `vector`."""
        return need(self._engine.rule, spec, None) + 8 * spec.numel

    def vector(
        self, wanted: Mix, files: Mapping[str, Opened], spec: TensorSpec, contents: Mapping[str, Content] | None = None
    ) -> Tensor:
        """X' of one tensor, float32. Members that have `contents` are read whatever is added of them, and hashed into
        these."""
        layer = self._layers[spec.name]
        keep = wanted.keep[layer]
        found = self._merged(spec) if keep else torch.zeros(spec.shape)
        if keep != 1.0:
            found.mul_(keep)
        flat = found.view(-1)
        for key, opened_member in files.items():
            scale = wanted.add[key][layer] if key in wanted.add else 0.0
            content = contents.get(key) if contents else None
            if spec.name not in opened_member.changed or not (scale or content):
                continue
            if contents is None:
                opened_member.add(spec.name, found, scale)
                continue
            for start, stop, tau in opened_member.files.vectors.runs(spec.name, content):
                flat[start:stop].add_(tau, alpha=scale)
        return found

    def files(self, wanted: Mix, stack: ExitStack, besides: Sequence[str] = ()) -> dict[str, Opened]:
        """Opens the members that `wanted` reads, and `besides`, until `stack` closes. Raises Refuse where one is gone,
        Retry where one cannot be read now."""
        keys = sorted({*wanted.add, *besides})
        return {key: stack.enter_context(opened(self._engine, self._members[key])) for key in keys}

    def write(
        self, transaction: Transaction, wanted: Mix, entering: Sequence[str], progress: Progress
    ) -> tuple[float, dict[str, str]]:
        """Writes X' into `transaction`. Returns ‖X'‖², and the content digests of the members that are `entering`.
        Raises Refuse where a member is gone, Retry."""
        with ExitStack() as stack:
            files = self.files(wanted, stack, entering)
            parts: dict[str, dict[str, bytes]] = {key: {} for key in entering}

            def one(spec: TensorSpec) -> float:
                contents = {key: Content() for key in entering if spec.name in files[key].changed}
                layer = self._layers[spec.name]
                stays = wanted.keep[layer] == 1.0 and not any(
                    add[layer] for key, add in wanted.add.items() if spec.name in files[key].changed
                )
                if stays and not contents and (square := transaction.square(spec.name)) is not None:
                    transaction.keep(spec.name)
                    return square
                found = self.vector(wanted, files, spec, contents)
                for key, content in contents.items():
                    parts[key][spec.name] = content.digest()
                if stays:
                    transaction.keep(spec.name)
                else:
                    transaction.write(spec.name, SLOT, found.numpy())
                return linalg.inner(found, found)

            squares: dict[str, float] = {}
            tasks = [Task(spec.name, self.need(spec), partial(one, spec)) for spec in self._specs]
            for name, square in self._engine.executor.map(tasks):
                squares[name] = square
                progress("fold", len(squares), len(tasks))
            transaction.measured(squares)
            for opened_member in files.values():
                opened_member.check_unchanged()
            digests = {key: files[key].files.vectors.digest(parts[key]) for key in entering}
            return math.fsum(squares[name] for name in sorted(squares)), digests
