"""Which parameters of a model in memory hold the tensors of a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from continual.errors import Misconfigured
from continual.records import TensorSpec

Parameters = dict[str, list[torch.Tensor]]
"""By the name of a base's tensor, the parameters and buffers of a model that hold it."""


def find_parameters(model: torch.nn.Module, specs: Sequence[TensorSpec], aliases: Mapping[str, str]) -> Parameters:
    """Finds each tensor of a base in `model`: under its name or an alias (`aliases`: alias to name), with or without
    the prefix of a transformers model's body. Tensors that are carried may be missing.

    Raises Misconfigured for a tensor that is nowhere, or has another shape there.
    """
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', 'model')}."
    names: dict[str, list[str]] = {spec.name: [spec.name] for spec in specs}
    for alias, name in aliases.items():
        names[name].append(alias)
    found: Parameters = {}
    for spec in specs:
        if spec.kind == "carried":
            continue
        known = [n for name in names[spec.name] for n in (name, name.removeprefix(prefix), prefix + name)]
        tensors = [held[name] for name in known if name in held]
        kind = type(model).__name__
        if not tensors:
            raise Misconfigured(
                f"tensor {spec.name} of the base is no parameter of {kind}: "
                "take another objective, or evaluate with --command"
            )
        if wrong := next((t for t in tensors if tuple(t.shape) != spec.shape), None):
            raise Misconfigured(
                f"tensor {spec.name} of the base has the shape {list(spec.shape)}, "
                f"and {list(wrong.shape)} in {kind}: evaluate with --command"
            )
        found[spec.name] = list({t.data_ptr(): t for t in tensors}.values())
    return found
