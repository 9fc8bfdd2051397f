"""What the table of families is made of: the class, a tiny configuration, and what such a model is asked.

Only names and numbers, so that any version of transformers or diffusers can read it. A class that a version does not
have makes its cells `n/a`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 96
IMAGE = 90
"""The token that stands for a part of an image."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family: the class `model` of `library` made from `config`, both by name, with `options`.

    `asks`: which inputs the model takes (`making.inputs_of`). `targets`: the modules that an adapter adapts, as PEFT
    has them (a word, a list or one pattern); `down`: which of them are fed by an activation, as IA3 asks. `table`,
    `head`: the last parts of the names of the input embedding and of the head; "" where there is none. `experts`: what
    holds packed experts, as PEFT's `target_parameters` name it. `gate`: a row of the slice that the gate runs.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    asks: str = "text"
    targets: str | tuple[str, ...] = "all-linear"
    table: str = ""
    head: str = ""
    experts: tuple[str, ...] = ()
    library: str = "transformers"
    down: tuple[str, ...] = ()
    gate: bool = False


def decoder(**more: Any) -> dict[str, Any]:
    """A configuration of a decoder, as most of them spell it."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | more


def encoder(**more: Any) -> dict[str, Any]:
    """A configuration of an encoder of texts."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    } | more


def sight(**more: Any) -> dict[str, Any]:
    """A configuration of a vision transformer."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "num_channels": 3,
    } | more


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LM = {"table": "embed_tokens", "head": "lm_head", "down": ("down_proj",)}
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_SIGHT = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
