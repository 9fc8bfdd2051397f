"""The one table of renamings: one weight under the names that libraries and their versions give it, and one canonical
name for all of them.

Names of a base and of a candidate are compared in canonical form: without wrappers, without the leading parts that
libraries add or leave out, and with the newest names of the family. Two names of one model that would become one keep
their own. `loaded` says what transformers 5 calls a weight of a file once the model is loaded: an adapter is written
under these names.

What a renaming cannot do, such as to split a tensor or to stack several, is not here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

_WRAPPERS = frozenset(
    (
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "module",
        "_fpw_module",
    )
)
"""Parts of a name that torch.compile, FSDP, checkpointing, DDP and DeepSpeed, and Lightning put anywhere in it."""
_LEADING = frozenset(("base_model", "model", "language_model", "vlm", "thinker"))
"""Leading parts that stand before the text model, or before all of it, and differ by version: `model.language_model.`,
`language_model.model.`, `model.`, nothing."""
_LONGEST = 8
"""Leading parts that are taken off a name."""

Pairs = tuple[tuple[str, str], ...]

_ANYWHERE: Pairs = (
    (".weight_g.", ".parametrizations.weight.original0."),
    (".weight_v.", ".parametrizations.weight.original1."),
    (".vision_tower.vision_model.", ".vision_tower."),
)
"""Old and new parts of a name in every family; a name is read with a dot before and after it. The first two are weight
norm, as torch had it and as it has it now."""
_SELF = tuple((f".attention.self.{old}.", f".attention.{new}_proj.") for old, new in (("query", "q"), ("key", "k")))
_TWICE = tuple(
    (f".attention.attention.{old}.", f".attention.{new}_proj.")
    for old, new in (("query", "q"), ("key", "k"), ("value", "v"))
)
_DENSE: Pairs = (
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)
_VIT: Pairs = ((".encoder.layer.", ".layers."), *_TWICE, *_DENSE)
_SPARSE: Pairs = ((".block_sparse_moe.", ".mlp."),)
_FAMILIES: Mapping[str, Pairs] = {
    **dict.fromkeys(
        ("vit", "deit", "beit", "audio-spectrogram-transformer", "ijepa", "vit_mae", "vit_msn", "vivit"), _VIT
    ),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers"), (*_TWICE, _DENSE[0], (".mlp.weights_out.", ".mlp.down_proj."))
    ),
    "swin": (
        *_SELF,
        (".attention.self.value.", ".attention.v_proj."),
        (
            ".attention.self.relative_position_bias_table.",
            ".attention.relative_position_bias.relative_position_bias_table.",
        ),
        *_DENSE,
    ),
    "mixtral": _SPARSE,
    "minimax": _SPARSE,
    "minimax_m2": _SPARSE,
    "gpt_neox": ((".embed_out.", ".lm_head."),),
}
"""Old and new parts of a name, tried in this order, by `model_type`."""

_TOWERS = frozenset(
    (
        "visual",
        "vision_tower",
        "vision_model",
        "image_tower",
        "video_tower",
        "audio_tower",
        "multi_modal_projector",
        "image_newline",
        "vision_embed_tokens",
    )
)
"""What stands beside the text model in a multimodal one."""
_MULTIMODAL = frozenset(
    (
        "aria",
        "aya_vision",
        "fuyu",
        "gemma3",
        "got_ocr2",
        "internvl",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "mllama",
        "paligemma",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_vl",
        "video_llava",
        "vipllava",
        "voxtral",
    )
)
"""`model_type`s whose class has `model.language_model.`, and towers such as `model.visual.`, under any file's names."""


def canonical(name: str, family: str) -> str:
    """The canonical name of a weight of this `model_type`, or of its module."""
    parts = name.split(".")
    parts = [part for part in parts if part not in _WRAPPERS] or parts
    first = 0
    while first < min(_LONGEST, len(parts) - 1) and parts[first] in _LEADING:
        first += 1
    return _exchanged(".".join(parts[first:]), family)


def canonical_names(names: Collection[str], family: str) -> dict[str, str]:
    """The canonical form of each of these names of one model: no two have the same one. Names that would become one
    keep their own."""
    found = {name: canonical(name, family) for name in names}
    often = Counter(found.values())
    kept = {name for name, short in found.items() if often[short] > 1}
    taken = kept & {short for name, short in found.items() if name not in kept}
    if taken:  # one that keeps its name would have the canonical name of another
        kept |= {name for name, short in found.items() if short in taken}
    return {name: name if name in kept else short for name, short in found.items()}


def loaded(name: str, config: Mapping[str, object]) -> str:
    """What transformers 5 calls the weight `name` of a file in the model that it loads: the same, but for families
    whose classes have other names than their files."""
    family = family_of(config)
    if family not in _MULTIMODAL:
        return _exchanged(name, family)
    short = canonical(name, family)
    listed = config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    head, _, _ = short.partition(".")
    if head == "lm_head":
        return short
    inner = short if head in _TOWERS else f"language_model.{short}"
    return inner if architecture.endswith("Model") else f"model.{inner}"


def family_of(config: Mapping[str, object]) -> str:
    """The `model_type` of a configuration, empty where it says none."""
    return str(config.get("model_type") or "")


class Renaming(NamedTuple):
    """What of a base's name is called otherwise in the candidate; `*` is any number."""

    ours: str
    theirs: str


def difference(ours: str, theirs: str) -> Renaming:
    """The part in which two names of one weight differ."""
    one, other = ours.split("."), theirs.split(".")
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    if start and not (one[start:] and other[start:]):  # what was added or left out says nothing without a neighbour
        start -= 1
    return Renaming(_starred(one[start:]), _starred(other[start:]))


def _starred(parts: Collection[str]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in parts)


def _exchanged(name: str, family: str) -> str:
    """A name with old parts exchanged for new ones."""
    dotted = f".{name}."
    for old, new in _pairs(family):
        dotted = dotted.replace(old, new)
    name = dotted[1:-1]
    head, _, last = name.rpartition(".")
    # old TensorFlow names; a layer scale of vision models, which is called gamma as well, lies in no norm
    if last in ("gamma", "beta") and "norm" in head.rpartition(".")[2].lower():
        name = f"{head}.{'weight' if last == 'gamma' else 'bias'}"
    return name


def _pairs(family: str) -> Iterator[tuple[str, str]]:
    yield from _ANYWHERE
    yield from _FAMILIES.get(family, ())
