"""A calibration objective whose optimum is known, given by `module:function` as a user would: every row asks for the
value of one projection of the parameters.

The tasks are the model directories in `targets/` beside the base: a row of a task has the loss ½⟨a, θ − θ*⟩², θ* being
the parameters there and `a` random signs where they differ from the base's, else 0. It is convex, and its gradient is
exact. `world` makes such a base with its targets, `good` and `noise` candidates.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from continual.objectives import Given
from tests.helpers import models

ROWS = 160


class Tree(nn.Module):
    """Parameters under dotted names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for head in dict.fromkeys(name.partition(".")[0] for name in tensors):
            inner = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == head}
            if "" in inner:
                self.register_parameter(head, nn.Parameter(inner[""].float()))
            else:
                self.add_module(head, Tree(inner))


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All values, in order of the names."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


@functools.cache
def drawn(seed: int, width: int) -> Tensor:
    """Random signs: rows × values."""
    return torch.randint(0, 2, (ROWS, width), generator=torch.Generator().manual_seed(seed)).mul(2).sub(1)


class Rows:
    """A task."""

    count = ROWS

    def __init__(self, model: nn.Module, base: Tensor, target: Tensor, seed: int) -> None:
        self.parameters = [tensor for _, tensor in sorted(model.named_parameters())]  # as `flat` has them
        self.signs = (drawn(seed, len(target)) * (target != base)).float()
        self.wanted = self.signs @ target
        self.taken: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def losses(self, rows: Sequence[int]) -> Tensor:
        key = tuple(rows)
        if key not in self.taken:  # the same batches come again and again
            self.taken[key] = self.signs[list(key)], self.wanted[list(key)]
        signs, wanted = self.taken[key]
        return 0.5 * (signs @ torch.cat([tensor.reshape(-1) for tensor in self.parameters]) - wanted).square()


def make(directory: Path, device: torch.device) -> Given:
    """The objective of the base in `directory`."""
    model = Tree(load_file(directory / "model.safetensors")).to(device)
    targets = sorted((directory.parent / "targets").iterdir())
    base = flat(load_file(directory / "model.safetensors"))
    return Given(
        model, [Rows(model, base, flat(load_file(t / "model.safetensors")), seed) for seed, t in enumerate(targets)]
    )


def world(place: Path, shapes: Mapping[str, tuple[int, ...]] = models.SHAPES) -> Path:
    """A base in `place`, and three targets that differ from it in one third of the tensors each, so that what is good
    for one task is nothing to the others."""
    base = models.base(place / "base", shapes=shapes)
    (place / "pool").mkdir()
    origin = load_file(base / "model.safetensors")
    for k in range(3):

        def keep(tensors: dict[str, Tensor], k: int = k) -> None:
            tensors.update({name: origin[name] for i, name in enumerate(shapes) if i % 3 != k})

        models.fine_tune(base, place / "targets" / f"t{k}", k, size=1.0, change=keep)
    return base


def good(base: Path, k: int, name: str | None = None, *, seed: int = 0, share: float = 1.0) -> Path:
    """A candidate that goes `share` of the way to target `k`, with noise besides."""
    origin = load_file(base / "model.safetensors")
    target = load_file(base.parent / "targets" / f"t{k}" / "model.safetensors")

    def change(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors:
            tensors[tensor] = tensors[tensor] + share * (target[tensor] - origin[tensor])

    return models.fine_tune(
        base, base.parent / "pool" / (name or f"good{k}"), 100 + k + 10 * seed, size=0.3, change=change
    )


def noise(base: Path, k: int, name: str | None = None) -> Path:
    """A candidate as far from the base as the others, in no direction."""
    return models.fine_tune(base, base.parent / "pool" / (name or f"noise{k}"), 50 + k, size=1.0)


def lora(base: Path, k: int | None, name: str, *, seed: int = 0, rank: int = 8, share: float = 1.0) -> Path:
    """An adapter of the linear layers that goes `share` of the way to target `k`, as far as its rank allows; without a
    target as far, in no direction."""
    origin = load_file(base / "model.safetensors")
    target = load_file(base.parent / "targets" / f"t{k or 0}" / "model.safetensors")
    random = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for weight, value in origin.items():
        change = share * (target[weight] - value)
        if value.dim() < 2 or "embed" in weight or not change.any():
            continue
        if k is None:
            change = torch.randn(change.shape, generator=random) * change.norm() / change.numel() ** 0.5
        u, sigma, vh = torch.linalg.svd(change, full_matrices=False)
        head = f"base_model.model.{weight.removesuffix('.weight')}"
        factors[f"{head}.lora_A.weight"] = vh[:rank].contiguous()
        factors[f"{head}.lora_B.weight"] = (u * sigma)[:, :rank].contiguous() + 1e-3 * torch.randn(
            len(u), rank, generator=random
        )
    directory = base.parent / "pool" / name
    directory.mkdir(parents=True)
    save_file(factors, directory / "adapter_model.safetensors")
    modules = sorted({n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in factors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def quits(_directory: Path, _device: torch.device) -> Given:
    """An objective of somebody who ends the program where it should raise."""
    sys.exit(3)
