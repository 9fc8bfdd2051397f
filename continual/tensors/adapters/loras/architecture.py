"""Which kind of diffusion model a LoRA file is for, as far as its header or its factors say, and which kind a base is.

Only what is certain counts: a word that is not known, or a base that several kinds can be, says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from continual.outside import shown
from continual.tensors.adapters.loras import parsing
from continual.tensors.adapters.loras.file import LoraFile
from continual.tensors.adapters.loras.targets import DENOISERS, prefixes
from continual.tensors.names.kinds import BaseModel

SD1, SD2, SDXL, SD3 = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL", "Stable Diffusion 3"
FLUX, FLUX2, WAN = "Flux", "Flux 2", "Wan"
_KEYS = ("modelspec.architecture", "ss_base_model_version")
_WORDS = (
    (re.compile(r"(?:sd_v1|sd1|stable-diffusion-v1)(?![0-9])"), SD1),
    (re.compile(r"(?:sd_v2|sd2|stable-diffusion-v2)(?![0-9])"), SD2),
    (re.compile(r"sdxl|stable-diffusion-xl"), SDXL),
    (re.compile(r"sd_?v?3|stable-diffusion-(?:v?3)"), SD3),
    (re.compile(r"flux[-_.]?2"), FLUX2),
    (re.compile(r"flux[-_.]?1|flux(?![0-9])"), FLUX),
    (re.compile(r"wan[-_]?2"), WAN),
)
"""How the words of a header begin, and the kind that they name."""
_WORD_SIZES = {768: SD1, 1024: SD2, 2048: SDXL}
"""How long the vectors of words are that a UNet's cross-attention reads."""
_CROSS = re.compile(r"(?:^|[._])attn2[._]to_[kv]$")


class KindTold(NamedTuple):
    """A kind of diffusion model, and what tells it of a file."""

    kind: str
    by: str


def told_by(file: LoraFile) -> KindTold | None:
    """The kind that a file is for; None where nothing tells it."""
    for key in _KEYS:
        word = file.said.get(key, "")
        for pattern, kind in _WORDS:
            if pattern.match(word.lower()):
                return KindTold(kind, f"its header says {key} = {shown(word)}")
    for group in file.groups:
        down = group.roles.get(parsing.DOWN)
        if down is not None and _CROSS.search(group.module) and len(down.shape) > 1 and down.shape[1] in _WORD_SIZES:
            return KindTold(_WORD_SIZES[down.shape[1]], f"{down.name} reads vectors of {down.shape[1]} numbers")
    return None


def kinds_of(base: BaseModel) -> frozenset[str]:
    """The kinds that a base can be; empty where it is none of those that are known here."""
    found = prefixes(base)
    prefix = next((found[name] for name in DENOISERS if name in found), None)
    if prefix is None:
        return frozenset()
    shapes: Mapping[str, tuple[int, ...]] = {
        spec.name.removeprefix(prefix): spec.shape for spec in base.specs if spec.name.startswith(prefix)
    }
    if any(name.startswith("down_blocks.") for name in shapes):
        if "add_embedding.linear_1.weight" in shapes:
            return frozenset((SDXL,))
        sizes = {shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight") and len(shape) == 2}
        known = frozenset(_WORD_SIZES[size] for size in sizes if size in _WORD_SIZES)
        return known if known <= {SD1, SD2} and known else frozenset((SD1, SD2))
    if "condition_embedder.time_embedder.linear_1.weight" in shapes:
        return frozenset((WAN,))
    if "pos_embed.proj.weight" in shapes and "time_text_embed.text_embedder.linear_1.weight" in shapes:
        return frozenset((SD3,))
    if any(name.startswith("single_transformer_blocks.") for name in shapes):
        if "time_guidance_embed.timestep_embedder.linear_1.weight" in shapes:
            return frozenset((FLUX2,))
        if {"x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight", "context_embedder.weight"} <= set(
            shapes
        ):
            return frozenset((FLUX,))
    return frozenset()
