"""Small models for the tests: a base in the common layout and fine-tunes of it, written by the safetensors library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (48, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 48),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (48, 16),
    "model.layers.1.mlp.down_proj.weight": (16, 48),
    "model.layers.1.input_layernorm.weight": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
}


def write(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object] | None = None) -> Path:
    """A model directory with one weight file; made under a temporary name and renamed, as publishers should."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    temporary.mkdir(parents=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        temporary / "model.safetensors",
        metadata={"format": "pt"},
    )
    (temporary / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    temporary.rename(directory)
    return directory


def base(
    directory: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A base with random weights."""
    random = torch.Generator().manual_seed(seed)
    return write(directory, {n: torch.randn(s, generator=random).mul(0.1).to(dtype) for n, s in shapes.items()})


def fine_tune(
    base: Path,
    directory: Path,
    seed: int,
    *,
    size: float = 0.02,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """The base plus a random task vector; `change` may do to the tensors what the test is about."""
    tensors = load_file(base / "model.safetensors")
    random = torch.Generator().manual_seed(1000 + seed)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random) * size * 0.1
            if tensor.ndim == 2 and min(tensor.shape) >= 64:  # a direction that stands out, as of what was trained
                left, right = (torch.randn(side, generator=random) for side in tensor.shape)
                strength = 2.5 * size * 0.1 * sum(math.sqrt(side) for side in tensor.shape)
                noise += strength * torch.outer(left / left.norm(), right / right.norm())
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    if change is not None:
        change(tensors)
    return write(directory, tensors, json.loads((base / "config.json").read_text()))


def big_shapes(gigabytes: float, *, layers: int, sides: tuple[int, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of a llama-like model of about `gigabytes` in bf16 with 9 tensors a layer, the embedding being its
    largest; or of layers with these `sides`, hidden and inner, and a small embedding."""
    width = 16 * max(1, round((gigabytes * 1e9 / 2 / layers / 12.5) ** 0.5 / 16))
    words = int(32e6 / width)
    width, wide, words = (*sides, 256) if sides else (width, 2 * width, words)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        head = f"model.layers.{layer}"
        shapes |= {f"{head}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{head}.mlp.{p}_proj.weight": (wide, width) for p in ("gate", "up")}
        shapes |= {f"{head}.mlp.down_proj.weight": (width, wide)}
        shapes |= {f"{head}.{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def ship(
    model: Path,
    seed: int,
    *,
    name: str = "fisher.safetensors",
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """Puts Fisher values beside the weights of a fine-tune, one of each parameter; returns the model."""
    random = torch.Generator().manual_seed(2000 + seed)
    values = {
        n: torch.rand(t.shape, generator=random).square() for n, t in load_file(model / "model.safetensors").items()
    }
    if change is not None:
        change(values)
    save_file(values, model / name)
    return model
