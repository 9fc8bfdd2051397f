"""The model in memory: put at a merged model, moved along the task vectors of members, and its gradient multiplied with
them.

It is in memory whole, and its gradient once more. Of a member there is never more in memory than one pass needs: of an
adapter its factors. Where a task vector is L·Rᵀ, ⟨G, L·Rᵀ⟩ is the sum of the elements of L ∘ (G·R), and ‖L·Rᵀ‖² that of
(LᵀL) ∘ (RᵀR): it is not multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from continual import linalg
from continual.engine.engine import Engine
from continual.engine.neighbours import accepted, earlier
from continual.errors import Misconfigured, Refuse
from continual.executors.contract import Progress, Task
from continual.gates import Numbers, TensorNumbers
from continual.lazily import Tensor, torch
from continual.objectives.calibration import Calibration
from continual.objectives.parameters import find_parameters
from continual.records import TensorSpec
from continual.selection.members import Member, Opened, opened, over
from continual.selection.mixing import layers
from continual.tensors.layouts.in_classes import elsewhere


class Score(NamedTuple):
    """⟨g_l, τ_l⟩ of a member for each layer l, and ‖τ‖²."""

    slopes: tuple[float, ...]
    tau_sq: float

    @property
    def total(self) -> float:
        """⟨g, τ⟩."""
        return math.fsum(self.slopes)


class ModelInMemory:
    """The model of a calibration, whose parameters are the base's. `layers` numbers the layer of each tensor; there are
    `count` layers, one where models are weighed whole."""

    def __init__(self, engine: Engine, calibration: Calibration, *, by_layer: bool = False) -> None:
        """Raises Misconfigured where a tensor of the base is no parameter of the model."""
        self.engine = engine
        self.calibration = calibration
        there = engine.weights.checkpoint.tensors  # of a model that a packed base was made from, not all it has
        specs = [spec for spec in engine.base.specs if spec.kind != "carried" and spec.name in there]
        self.parameters = find_parameters(calibration.model, specs, engine.base.aliases, elsewhere(engine.base))
        self.specs = [spec for spec in engine.base.specs if spec.name in self.parameters]
        self.layers = layers(engine.base, by_layer=by_layer)
        self.count = 1 + max(self.layers.values(), default=0)
        self._squares: dict[str, float] = {}

    def put(self, vector: Callable[[TensorSpec], Tensor], need: Callable[[TensorSpec], int]) -> None:
        """Sets the parameters to θ₀ + `vector(spec)` in float32, which an export rounds to the base's dtype. `need`:
        peak bytes of `vector`."""

        def one(spec: TensorSpec) -> None:
            value = vector(spec).add_(self.engine.weights.checkpoint.read(spec.name))
            with torch.no_grad():
                for held in self.parameters[spec.name]:
                    held.value.copy_(value)

        tasks = [Task(s.name, s.nbytes + 4 * s.numel + need(s), partial(one, s)) for s in self.specs]
        for _ in self.engine.executor.map(tasks):
            pass

    def move(self, member: Member, by: float | Sequence[float]) -> None:
        """θ += by·τ, or by[l]·τ_l in layer l. Raises Refuse where the member is gone, Retry."""
        with opened(self.engine, member) as found:
            scales = [by] * self.count if isinstance(by, int | float) else by

            def one(name: str) -> None:
                scale = scales[self.layers[name]]
                for held in self.parameters[name] if scale else ():
                    found.add(name, held.value, scale)

            tasks = [Task(n, found.nbytes(n), partial(one, n)) for n in found.changed]
            for _ in self.engine.executor.map(tasks):
                pass

    def backward(self) -> float:
        """The loss on the rows that drive, and its gradient, kept until `clear`. Raises Misconfigured as
        `Calibration.backward` does."""
        return self.calibration.backward()

    def clear(self) -> None:
        """Lets the gradient go."""
        for tensor in self.calibration.model.parameters():
            tensor.grad = None

    def scores(self, members: Sequence[Member], progress: Progress) -> dict[str, Score | Refuse]:
        """By key, the score of every member, each read once; the refusal of a member that cannot be had, or that the
        gates on numbers refuse. ‖τ‖² is taken when a member is seen first. Raises Retry, and Abandoned when told to
        stop."""
        gradients = {spec.name: self._gradient(spec.name) for spec in self.specs}
        return over(self.engine, members, partial(self._score, gradients), "score", progress)

    def _score(self, gradients: dict[str, Tensor | None], member: Member, found: Opened) -> Score:
        if lacking := [name for name in found.changed if name not in self.parameters]:
            raise Misconfigured(
                f"{member.name} changes {lacking[0]}, which {self.engine.weights.checkpoint.place} does not have: name "
                "a folder with the whole model: base = DIR (--base)"
            )
        slopes = [0.0] * self.count
        new = member.key not in self._squares
        tau_sq: list[float] = []
        for name in found.changed:
            gradient = gradients[name]
            if not new and gradient is None:
                continue
            dot, square = found.inners(name, gradient, square=new)
            if new:
                tau_sq.append(square)
                self.engine.gates.at_tensor(TensorNumbers(member.name, name, square))
            slopes[self.layers[name]] += dot
        if new:
            self._vet(member, found, math.fsum(tau_sq))
            self._squares[member.key] = math.fsum(tau_sq)
        return Score(tuple(slopes), self._squares[member.key])

    def _vet(self, member: Member, found: Opened, tau_sq: float) -> None:
        """Raises Refuse where the gates on norms refuse the member. A state that keeps it has let it in; one that keeps
        adapters has no norms of its base."""
        if member.kept is not None:
            return
        state = self.engine.state
        squares = state.format.base.squares
        base_norm = math.sqrt(math.fsum(squares[name] for name in found.changed)) if squares else None
        known, wanted = partial(earlier, state.ledger, member.candidate.origin), accepted(state.ledger, member.key)
        seen = Numbers(member.name, math.sqrt(tau_sq), base_norm, state.ledger.totals, earlier=known, accepted=wanted)
        self.engine.gates.at_numbers(seen)

    def along(self, vector: Callable[[TensorSpec], Tensor]) -> list[float]:
        """⟨g_l, x_l⟩ for each layer l, x being what `vector` gives."""
        sums: list[list[float]] = [[] for _ in range(self.count)]
        for spec in self.specs:
            gradient = self._gradient(spec.name)
            if gradient is not None:
                sums[self.layers[spec.name]].append(linalg.inner(gradient, vector(spec).to(gradient.device)))
        return [math.fsum(part) for part in sums]

    def _gradient(self, name: str) -> Tensor | None:
        """The gradient of one tensor of the base, flat: the sum over the parameters that hold it; None where the loss
        does not depend on it."""
        each = (held.gradient for held in self.parameters[name])
        found = [gradient.reshape(-1) for gradient in each if gradient is not None]
        return sum(found[1:], found[0]) if found else None
