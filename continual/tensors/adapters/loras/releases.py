"""How the modules of a diffusion model are called in its original release, from what diffusers calls them.

Trainers keep the names of the release: `input_blocks.4.1.proj_in` for the UNet of Stable Diffusion XL,
`double_blocks.0.img_attn.qkv` for Flux. Some modules are one there and several in diffusers: then a name means several,
one after the other in its rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

_INNER = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


class Meaning(NamedTuple):
    """The modules of diffusers that one of the release is, in the order of its rows. `swapped`: its two halves lie the
    other way round there."""

    modules: tuple[str, ...]
    swapped: bool = False


def original(modules: Collection[str]) -> dict[str, Meaning]:
    """What the modules of a denoiser are called in its release, and what each name means; empty for a model of which
    that is not known."""
    present = frozenset(modules)
    if any(name.startswith("down_blocks.") for name in present):
        return {theirs: Meaning((ours,)) for ours, theirs in unet(present).items()}
    if any(name.startswith("single_transformer_blocks.") for name in present):
        return _by_table(present, _FLUX)
    if "pos_embed.proj" in present and "transformer_blocks.0.attn.add_q_proj" in present:
        return _by_table(present, _SD3, _last_block(present))
    if "condition_embedder.time_embedder.linear_1" in present and "blocks.0.attn1.to_q" in present:
        return _by_table(present, _WAN)
    return {}


def unet(modules: Collection[str]) -> dict[str, str]:
    """What the modules of a UNet of diffusers are called in the releases of Stable Diffusion, by diffusers' names."""
    heads = dict(_blocks(modules))
    found: dict[str, str] = {}
    for name in modules:
        if name in _OUTER:
            found[name] = _OUTER[name]
            continue
        head = ".".join(name.split(".")[: 3 if name.startswith("mid_block.") else 4])
        if head not in heads:
            continue
        rest = name.removeprefix(head).lstrip(".")
        if ".resnets." in head:
            rest = next((new for old, new in _INNER if rest == old), rest)
        elif ".downsamplers." in head:
            rest = "op" if rest == "conv" else rest
        found[name] = f"{heads[head]}.{rest}" if rest else heads[head]
    return found


def _blocks(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """The blocks of a UNet under both names."""
    heads = {".".join(name.split(".")[:4]) for name in modules if name.startswith(("down_blocks.", "up_blocks."))}
    number = 1
    for block in range(_count(heads, r"down_blocks\.(\d+)\..*")):
        at = f"down_blocks.{block}"
        for layer in range(_count(heads, rf"down_blocks\.{block}\.resnets\.(\d+)")):
            yield f"{at}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{at}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if f"{at}.downsamplers.0" in heads:
            yield f"{at}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    for layer in range(2):
        yield f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}"
    yield "mid_block.attentions.0", "middle_block.1"
    number = 0
    for block in range(_count(heads, r"up_blocks\.(\d+)\..*")):
        at = f"up_blocks.{block}"
        layers = _count(heads, rf"up_blocks\.{block}\.resnets\.(\d+)")
        for layer in range(layers):
            yield f"{at}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{at}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        if layers and f"{at}.upsamplers.0" in heads:
            inner = 2 if f"{at}.attentions.{layers - 1}" in heads else 1
            yield f"{at}.upsamplers.0", f"output_blocks.{number - 1}.{inner}"


def _count(heads: Collection[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for head in heads if (match := re.fullmatch(pattern, head))), default=-1)


Table = Mapping[str, tuple[str, ...]]
_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_IMAGE = tuple(f"{_DOUBLE}.attn.{role}" for role in ("to_q", "to_k", "to_v"))
_WORDS = tuple(f"{_DOUBLE}.attn.{role}" for role in ("add_q_proj", "add_k_proj", "add_v_proj"))
_QKV = tuple(f"{_SINGLE}.attn.{role}" for role in ("to_q", "to_k", "to_v"))
_FLUX: Table = {
    "double_blocks.*.img_attn.qkv": _IMAGE,
    "double_blocks.*.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.*.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.*.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.*.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.*.txt_attn.qkv": _WORDS,
    "double_blocks.*.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.*.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.*.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.*.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "single_blocks.*.linear1": (*_QKV, f"{_SINGLE}.proj_mlp"),
    "single_blocks.*.linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks.*.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("~norm_out.linear",),
    # as the trainer of XLabs calls what it adds
    "double_blocks.*.processor.qkv_lora1": _IMAGE,
    "double_blocks.*.processor.proj_lora1": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.*.processor.qkv_lora2": _WORDS,
    "double_blocks.*.processor.proj_lora2": (f"{_DOUBLE}.attn.to_add_out",),
    "single_blocks.*.processor.qkv_lora": _QKV,
    "single_blocks.*.processor.proj_lora": (f"{_SINGLE}.proj_out",),
}
_SD3: Table = {
    "joint_blocks.*.x_block.attn.qkv": _IMAGE,
    "joint_blocks.*.x_block.attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "joint_blocks.*.x_block.attn2.qkv": tuple(f"{_DOUBLE}.attn2.{role}" for role in ("to_q", "to_k", "to_v")),
    "joint_blocks.*.x_block.attn2.proj": (f"{_DOUBLE}.attn2.to_out.0",),
    "joint_blocks.*.x_block.mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "joint_blocks.*.x_block.mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "joint_blocks.*.x_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1.linear",),
    "joint_blocks.*.context_block.attn.qkv": _WORDS,
    "joint_blocks.*.context_block.attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "joint_blocks.*.context_block.mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "joint_blocks.*.context_block.mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "joint_blocks.*.context_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1_context.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("~norm_out.linear",),
}
_WAN: Table = {
    **{
        f"blocks.*.{theirs}.{old}": (f"blocks.*.{ours}.{new}",)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for old, new in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("k_img", "add_k_proj"), ("v_img", "add_v_proj")),
        )
    },
    "blocks.*.ffn.0": ("blocks.*.ffn.net.0.proj",),
    "blocks.*.ffn.2": ("blocks.*.ffn.net.2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "head.head": ("proj_out",),
}
"""The names of releases, `*` for the number of a block, and the modules of diffusers; `~` before one whose halves are
swapped."""


def _by_table(present: frozenset[str], table: Table, swapped: frozenset[str] = frozenset()) -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    most = 1 + max((int(part) for name in present for part in name.split(".")[1:2] if part.isdecimal()), default=0)
    for theirs, ours in table.items():
        for number in range(most) if "*" in theirs else (0,):
            modules = tuple(name.replace("*", str(number)) for name in ours)
            plain = tuple(name.removeprefix("~") for name in modules)
            if present.issuperset(plain):
                found[theirs.replace("*", str(number))] = Meaning(plain, plain != modules or plain[0] in swapped)
    return found


def _last_block(present: frozenset[str]) -> frozenset[str]:
    """The modulation of the words in the last block of Stable Diffusion 3, which has only a scale and a shift."""
    numbers = [int(name.split(".")[1]) for name in present if name.startswith("transformer_blocks.")]
    return frozenset((f"transformer_blocks.{max(numbers)}.norm1_context.linear",))
