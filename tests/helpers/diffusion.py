"""Diffusion models under the names that diffusers gives their tensors, and LoRA files as trainers write them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "transformer": "FluxTransformer2DModel",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}


@functools.cache
def table() -> dict[str, Any]:
    """What the campaign `tests.campaigns.diffusion` wrote with diffusers."""
    found = json.loads((Path(__file__).parents[1] / "data" / "names_of_diffusers.json").read_text())
    assert isinstance(found, dict)
    return found


def shapes(family: str) -> Shapes:
    """The tensors of a tiny model of a family, by their names in the whole pipeline."""
    return {name: tuple(shape) for name, shape in table()["tensors"][family].items()}


def component(family: str, name: str) -> Shapes:
    """The tensors of one of its components, by their names in it."""
    return {full.removeprefix(f"{name}."): s for full, s in shapes(family).items() if full.startswith(f"{name}.")}


def modules(found: Shapes, *, ends: Iterable[str] = ("",), within: str = "") -> Shapes:
    """The linear layers and convolutions among these tensors, with the shapes of their weights."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in found.items()
        if name.endswith(".weight") and len(shape) in (2, 4) and "embed" not in name.split(".")[-2]
        if within in name and name.removesuffix(".weight").endswith(tuple(ends))
    }


def pipeline(directory: Path, family: str, only: str | None = None) -> Path:
    """A base of this family with random weights: the whole pipeline, or the folder of one component."""
    generator = torch.Generator().manual_seed(7)
    parts: dict[str, Tensors] = {}
    for name, shape in shapes(family).items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = torch.randn(shape, generator=generator) * 0.1
    for head, tensors in parts.items():
        if only is not None and head != only:
            continue
        folder = directory if only else directory / head
        folder.mkdir(parents=True, exist_ok=True)
        denoiser = head in ("unet", "transformer")
        save_file(tensors, folder / ("diffusion_pytorch_model.safetensors" if denoiser else "model.safetensors"))
        kind = {"_class_name": _CLASSES[head]} if denoiser else {"model_type": "clip_text_model"}
        (folder / "config.json").write_text(json.dumps(kind))
    if only is None:
        index = {head: ["diffusers", _CLASSES[head]] for head in parts}
        (directory / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index}))
    return directory


def factors(shape: tuple[int, ...], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up of a linear layer or a convolution."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    return down, up


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What two factors add, in float64."""
    found = up.double().flatten(1) @ down.double().flatten(1)
    return found.reshape(up.shape[0], *down.shape[1:])


def kohya(
    prefix: str, found: Mapping[str, tuple[int, ...]], rank: int = 3, named: Callable[[str], str] = str
) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """A file as sd-scripts writes it, each module with an alpha of its own; and what is added to each module."""
    file: Tensors = {}
    added: dict[str, torch.Tensor] = {}
    for seed, (module, shape) in enumerate(sorted(found.items())):
        down, up = factors(shape, rank, seed)
        flat = f"{prefix}_{named(module).replace('.', '_')}"
        alpha = 1.0 + seed % 4
        file |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(alpha)}
        added[module] = product(down, up) * alpha / rank
    return file, added


def written(directory: Path, file: Tensors, name: str = "lora.safetensors", **metadata: str) -> Path:
    """A folder with one LoRA file."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous().clone() for key, value in file.items()}, directory / name, metadata=metadata or None
    )
    return directory
