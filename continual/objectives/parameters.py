"""Which parameters of a model in memory hold the tensors of a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.lazily import torch
from continual.records import TensorSpec


class Spot(NamedTuple):
    """Where a tensor lies in a packed parameter: in its matrix of this `number`, from row `start` to `stop`."""

    parameter: str
    number: int
    start: int
    stop: int


class Elsewhere(NamedTuple):
    """How a class may call and lay out what a base's files have. `canonical`: one name for all that a weight has.
    `packed`: the spots in which a tensor of this name and shape can lie."""

    canonical: Callable[[str], str] = str
    packed: Callable[[str, tuple[int, ...]], Sequence[Spot]] = lambda *_: ()


AS_IN_FILES = Elsewhere()
"""A class that calls and lays out everything as the files do."""


class HeldIn(NamedTuple):
    """A parameter or buffer that holds a tensor, whole or in a spot of it."""

    tensor: torch.Tensor
    spot: Spot | None = None

    @property
    def value(self) -> torch.Tensor:
        """The values: contiguous, and in the model's memory."""
        return self._within(self.tensor.detach())

    @property
    def gradient(self) -> torch.Tensor | None:
        """Their gradient, where there is one."""
        return None if self.tensor.grad is None else self._within(self.tensor.grad)

    def _within(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.spot is None else tensor[self.spot.number, self.spot.start : self.spot.stop]


Parameters = dict[str, list[HeldIn]]
"""By the name of a base's tensor, what of a model holds it."""


def find_parameters(
    model: torch.nn.Module,
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
    elsewhere: Elsewhere = AS_IN_FILES,
) -> Parameters:
    """Finds each tensor of a base in `model`: under its name or an alias (`aliases`: alias to name), with or without
    the prefix of a transformers model's body, or as `elsewhere` says. Tensors that are carried may be missing.

    Raises Misconfigured for a tensor that is nowhere, or has another shape there.
    """
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', 'model')}."
    names: dict[str, list[str]] = {spec.name: [spec.name] for spec in specs}
    short: dict[str, list[str]] = {}
    for name in held:
        short.setdefault(elsewhere.canonical(name), []).append(name)
    for alias, name in aliases.items():
        names[name].append(alias)

    def known(name: str) -> list[torch.Tensor]:
        exact = [one for one in (name, name.removeprefix(prefix), prefix + name) if one in held]
        alike = short.get(elsewhere.canonical(name), []) if not exact else []
        return [held[one] for one in exact or (alike if len(alike) == 1 else [])]

    found: Parameters = {}
    for spec in specs:
        if spec.kind == "carried":
            continue
        tensors = [HeldIn(tensor) for name in names[spec.name] for tensor in known(name)]
        if not tensors:
            spots = elsewhere.packed(spec.name, spec.shape)
            tensors = [
                HeldIn(tensor, spot) for spot in spots for tensor in known(spot.parameter) if _holds(tensor, spot)
            ]
        kind = type(model).__name__
        if not tensors:
            raise Misconfigured(
                f"tensor {spec.name} of the base is no parameter of {kind}: "
                "take another objective, or evaluate with --command"
            )
        if wrong := next((one.value for one in tensors if tuple(one.value.shape) != spec.shape), None):
            raise Misconfigured(
                f"tensor {spec.name} of the base has the shape {list(spec.shape)}, "
                f"and {list(wrong.shape)} in {kind}: evaluate with --command"
            )
        found[spec.name] = list({one.value.data_ptr(): one for one in tensors}.values())
    return found


def _holds(tensor: torch.Tensor, spot: Spot) -> bool:
    return tensor.dim() == 3 and spot.number < tensor.shape[0] and spot.stop <= tensor.shape[1]
