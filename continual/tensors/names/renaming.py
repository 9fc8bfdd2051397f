"""The one table of renamings: one weight under the names that libraries and their versions give it, and one canonical
name for all of them.

Names of a base and of a candidate are compared in canonical form: without wrappers, without the leading parts that
libraries add or leave out, and with the newest names of the family. Two names of one model that would become one keep
their own. `loaded` says what transformers 5 calls a weight of a file once the model is loaded: an adapter is written
under these names.

What a renaming cannot do, such as to split a tensor or to stack several, is not here.
"""

from __future__ import annotations

import functools
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
    (".image_tower.vision_model.", ".image_tower."),
    (".video_tower.vision_model.", ".video_tower."),
)
"""Old and new parts of a name in every family; a name is read with a dot before and after it. The first two are weight
norm, as torch had it and as it has it now."""
_PIPELINES: Pairs = (
    *((f".{part}.text_model.", f".{part}.") for part in ("text_encoder", "text_encoder_2", "text_encoder_3")),
    (".image_encoder.vision_model.", ".image_encoder."),
    (".mid_block.attentions.0.query.", ".mid_block.attentions.0.to_q."),
    (".mid_block.attentions.0.key.", ".mid_block.attentions.0.to_k."),
    (".mid_block.attentions.0.value.", ".mid_block.attentions.0.to_v."),
    (".mid_block.attentions.0.proj_attn.", ".mid_block.attentions.0.to_out.0."),
)
"""The same in components of pipelines: the towers of transformers 4 and 5, and the attention of an autoencoder in old
and new versions of diffusers. Names of the classes are others again, so `loaded` does not ask these."""
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
_PAINTS: Pairs = ((".decoder_encoder.layer.", ".decoder_layers."),)
_SPARSE: Pairs = ((".block_sparse_moe.", ".mlp."),)
_GRANITE: Pairs = (
    (".block_sparse_moe.input_linear.weight.", ".block_sparse_moe.experts.gate_up_proj."),
    (".block_sparse_moe.output_linear.weight.", ".block_sparse_moe.experts.down_proj."),
    (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
)
_ARIA: Pairs = (
    (".mlp.experts.fc1.weight.", ".mlp.experts.gate_up_proj."),
    (".mlp.experts.fc2.weight.", ".mlp.experts.down_proj."),
)
_FAMILIES: Mapping[str, Pairs] = {
    **dict.fromkeys(("vit", "deit", "beit", "audio-spectrogram-transformer", "ijepa", "vivit"), _VIT),
    "vit_mae": (*_VIT, *_PAINTS),
    "vit_msn": ((".vit.", "."), *_VIT),  # transformers 5 writes its layers without what stands before the rest
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
    "altclip": ((".encoder.layer.", ".encoder.layers."),),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"), ((".per_layer_model.language_model_projection.", ".per_layer_model_projection."),)
    ),  # as transformers 4.57 exchanged too much of a name
    "mixtral": _SPARSE,
    "minimax": _SPARSE,
    "minimax_m2": _SPARSE,
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
    **dict.fromkeys(("aria", "aria_text"), _ARIA),
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
        "audioflamingo3",
        "aya_vision",
        "fuyu",
        "gemma3",
        "glmasr",
        "got_ocr2",
        "internvl",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "mllama",
        "musicflamingo",
        "paligemma",
        "pp_chart2table",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_vl",
        "video_llava",
        "vipllava",
        "voxtral",
        "voxtral_realtime",
    )
)
"""`model_type`s whose class has `model.language_model.`, and towers such as `model.visual.`, under any file's names."""
_ALONE: Mapping[str, str] = {
    "clip_text_model": "text_model.",
    "clip_vision_model": "vision_model.",
    "siglip_text_model": "text_model.",
    "siglip_vision_model": "vision_model.",
    "siglip2_text_model": "text_model.",
    "siglip2_vision_model": "vision_model.",
}
"""What files of transformers 4 have before the names of a tower that stands alone, and its class has not any more; one
with a projection or a classifier still has it."""
_OTHERWISE = """
    altclip aria_text axk1 axk2 bailing_hybrid cohere_asr colqwen2 conditional_detr cosmos3_edge cosmos3_omni d_fine
    deepseek_ocr2 deepseek_v4 deformable_detr detr dinov3_convnext dinov3_vit dots3_note_audio_encoder
    dots3_note_vision_encoder emu3 ernie4_5_moe ernie4_5_vl_moe exaone_moe flint gemma4_unified glm5_next glm5_next_text
    gradium_phonon_tts granite_speech granite_speech_plus gte hrm_text hunyuan_vl hy_v3 hy_v4 hyperclovax_vision_v2
    inkling2 inkling2_text inkling_mm_model jev jina_embeddings_v3 kimi_k25 kimi_linear kolibri1 laguna lfm3
    lfm3_vl_vision lw_detr maskformer mimi mimo_v2_flash minimax_m3_vl mistral_large4 mistral_large4_text mlcd
    mlcd_vision molmo2 nemo_speechlm nemotron_h nomic_bert olmo_hybrid paddleocr_vl pi0 pixio pp_doclayout_v2
    pp_doclayout_v3 pp_doclayout_v4 qianfan_ocr qwen2_5_omni qwen2_5_omni_thinker qwen3_omni_moe
    qwen3_omni_moe_thinker qwen4_exp_text radio rf_detr rt_detr rt_detr_v2 sam3_tracker sam3_tracker_video sapiens2
    segformer shieldgemma2 step3p5_vision step3p7 t5gemma2_encoder timesfm2_5 timm_wrapper tipsv2 tipsv2_dpt ultrabert
    ultravbert unlimited_ocr vibevoice_asr videomae yolos
    """
"""`model_type`s that transformers 5 loads under other names than its files have, which this table does not know."""


@functools.lru_cache(maxsize=1 << 15)  # a fold asks four times for each name, and each candidate for the base's
def canonical(name: str, family: str) -> str:
    """The canonical name of a weight of this `model_type`, or of its module."""
    parts = name.split(".")
    parts = [part for part in parts if part not in _WRAPPERS] or parts
    first = 0
    while first < min(_LONGEST, len(parts) - 1) and parts[first] in _LEADING:
        first += 1
    return _exchanged(".".join(parts[first:]), family, _PIPELINES)


def canonical_names(names: Collection[str], family: str) -> dict[str, str]:
    """The canonical form of each of these names of one model: no two have the same one. Names that would become one
    keep their own."""
    found = {name: canonical(name, family) for name in names}
    often = Counter(found.values())
    return {name: name if often[short] > 1 else short for name, short in found.items()}


def loaded(name: str, config: Mapping[str, object]) -> str:
    """What transformers 5 calls the weight `name` of a file in the model that it loads: the same, but for families
    whose classes have other names than their files."""
    family = family_of(config)
    listed = config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    if family not in _MULTIMODAL:
        if architecture.endswith(("TextModel", "VisionModel")):
            name = name.removeprefix(_ALONE.get(family, ""))
        return _exchanged(name, family)
    short = canonical(name, family)
    head, _, _ = short.partition(".")
    if head == "lm_head":
        return short
    inner = short if head in _TOWERS else f"language_model.{short}"
    return inner if architecture.endswith("Model") else f"model.{inner}"


def alone(config: Mapping[str, object]) -> str:
    """What a whole model has before the names of the tower that this configuration is of; empty for any other model."""
    return _ALONE.get(family_of(config), "")


def is_known(config: Mapping[str, object]) -> bool:
    """Whether `loaded` knows the names of this family."""
    return family_of(config) not in _OTHERWISE.split()


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
    shared = ""
    while one and other and one[-1] == other[-1]:
        shared = one.pop()
        other.pop()
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    if not (one[start:] and other[start:]):  # what was added or left out says nothing without a neighbour
        if start:
            start -= 1
        else:
            one, other = [*one, shared], [*other, shared]
    return Renaming(_starred(one[start:]), _starred(other[start:]))


def _starred(parts: Collection[str]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in parts)


def _exchanged(name: str, family: str, first: Pairs = ()) -> str:
    """A name with old parts exchanged for new ones, those of `first` before the others."""
    dotted = f".{name}."
    for old, new in (*first, *_pairs(family)):
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
