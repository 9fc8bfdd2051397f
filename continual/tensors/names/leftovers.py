"""What is left over when a candidate's names have been matched with the base's: weights that the base lacks on one
side, weights that the candidate lacks on the other; and whether they are the same weights after all.

What becomes of that is for gates/lineage.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from continual.records import TensorSpec
from continual.tensors.names.kinds import is_vocabulary
from continual.tensors.names.renaming import canonical

_HEADS = frozenset(
    (
        "answer_head",
        "auxiliary_head",
        "bbox_embed",
        "bbox_predictor",
        "class_embed",
        "class_predictor",
        "classification_head",
        "cls",
        "ctc_proj",
        "decode_head",
        "denoising_class_embed",
        "discriminator_predictions",
        "embed_out",
        "enc_score_head",
        "fc",
        "fc_norm",
        "final_proj",
        "generator_lm_head",
        "generator_predictions",
        "head",
        "heads",
        "label_embeddings_concat",
        "label_embs_concat",
        "layer_norm_for_extract",
        "lm_head",
        "lm_loss",
        "logits_proj",
        "mask_token",
        "pooler",
        "pre_classifier",
        "pred_layer",
        "predictions",
        "project_hid",
        "project_q",
        "projection_head",
        "projector",
        "qa_outputs",
        "quantizer",
        "score",
        "segmentation_head",
        "seq_relationship",
        "speaker_proj",
        "summary",
        "text_projection",
        "v_head",
        "value_head",
        "visual_projection",
        "vocab_layer_norm",
        "vocab_projector",
        "vocab_transform",
    )
)
"""Parts of names that are heads of a task, or what pools for one, beside all in which there is the word classifier. A
fine-tune for another task leaves out the base's, and brings its own, perhaps of the same shape: these are two weights.
"""
_PIXELS = re.compile(r"decoder(?:\.\d+)?\.(?:weight|bias)")
"""The last layer of ModernBERT's head of words, and of vision transformers that paint what was masked."""
_DECODERS: Mapping[str, tuple[str, ...]] = {
    "vit_mae": ("decoder",),
    "videomae": ("decoder", "encoder_to_decoder", "position_embeddings"),
}
"""First parts of names of what paints pictures in pretraining, and has layers, by `model_type`."""
_SPARE = frozenset(("pooler", "seq_relationship"))
"""Heads that many classes do not have and some have beside their own."""
_OUTPUTS = frozenset(
    [
        "embed_out",
        "lm_head",
        "generator_lm_head",
        "vocab_projector",
        "pred_layer",
        "output_projection",
        "output_layer",
        "predictions",
    ]
)
"""Parts of names of tables that stand at a language model's end."""
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
"""How configurations say how many layers there are."""
_PARTS = ("lora_", "base_layer", "hada_w", "lokr_w", "ia3_l", "vera_lambda", "boft_", "oft_r", "modules_to_save")
"""How parts of a name begin that only an adapter has."""


class Left(NamedTuple):
    """A tensor that is left over on one side."""

    name: str
    shape: tuple[int, ...]


def same_after_all(missing: Iterable[Left], extra: Iterable[Left], family: str) -> tuple[Left, Left] | None:
    """The first pair of a tensor that the candidate lacks and one that the base lacks which may be the same weights
    under another name or in another layout; None where there is none.

    They may where both lie in one layer, or have one shape, unless the candidate's is a head of its own.
    """
    layers: dict[str, Left] = {}
    shapes: dict[tuple[int, ...], Left] = {}
    words: dict[tuple[int, ...], Left] = {}
    for left in missing:
        layers.setdefault(_layer(canonical(left.name, family)), left)
        shapes.setdefault(left.shape, left)
        if is_vocabulary(left.name):
            words.setdefault(left.shape, left)
    layers.pop("", None)
    for left in extra:
        name = canonical(left.name, family)
        layer = _layer(name)
        head = bool(_head_of(name, family))
        found = layers.get(layer) or (words if head and is_vocabulary(left.name) else {} if head else shapes).get(
            left.shape
        )
        if found is not None:
            return found, left
    return None


def of_another_task(
    missing: Iterable[TensorSpec], base: Mapping[str, object], model: Mapping[str, object], family: str
) -> tuple[str, ...]:
    """Those of the tensors that a candidate lacks which are heads that its class does not have: nothing is lost there.

    `base` and `model` are the two configurations: the classes that they name tell whether the base's own head has to be
    in the candidate.
    """
    ours, theirs = _class_of(base), _class_of(model)
    if not theirs:
        return ()
    found = []
    for spec in missing:
        head = _head_of(canonical(spec.name, family), family)
        if head and (ours != theirs or head.rpartition(".")[2] in _SPARE or "seq_relationship" in spec.name):
            found.append(spec.name)
    return tuple(found)


def of_another_size(
    shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, TensorSpec], family: str
) -> frozenset[str]:
    """The heads, by the base's names, that a candidate has for another number of classes: all of a head whose first
    axis differs somewhere. `shapes`: what the candidate has, by the base's names.

    A table of words is no such head, unless it stands alone: the one of a model that hears has an alphabet of its own.
    """
    reads = any(is_vocabulary(name) and not is_output(name) for name in specs)
    other: set[str] = set()
    heads: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        head = "" if reads and is_vocabulary(name) else _head_of(canonical(name, family), family)
        if head:
            heads.setdefault(head, []).append(name)
            ours = specs[name].shape
            if shape != ours and len(shape) == len(ours) and shape[1:] == ours[1:]:
                other.add(head)
    return frozenset(name for head in other for name in heads[head])


def of_another_depth(base: Mapping[str, object], model: Mapping[str, object]) -> tuple[int, int] | None:
    """The numbers of layers of the base and of a candidate that has more or fewer, by the two configurations; None
    where they have the same, or do not say. Its layers are not those of the base that have their numbers."""
    for ours, theirs in zip(_bodies(base), _bodies(model), strict=True):
        for key in _DEPTHS:
            one, other = ours.get(key), theirs.get(key)
            if isinstance(one, int) and isinstance(other, int) and one != other:
                return one, other
    return None


def of_an_adapter(names: Iterable[str]) -> str | None:
    """The first of these names that only an adapter has which was not merged."""
    return next((name for name in names if any(part.startswith(_PARTS) for part in name.split("."))), None)


def in_layer(name: str, family: str) -> bool:
    """Whether a name is that of a weight in a numbered layer."""
    return bool(_layer(canonical(name, family)))


def is_head(name: str, family: str) -> bool:
    """Whether a name is that of a weight in a head of a task, which a base may lack."""
    return bool(_head_of(canonical(name, family), family))


def is_output(name: str) -> bool:
    """Whether a table of words is a language model's head, not an input embedding."""
    return not _OUTPUTS.isdisjoint(name.split(".")) or name in ("output.weight", "proj_out.weight")


def _layer(name: str) -> str:
    """What stands before the layer's number, and the number; empty for a tensor that lies in no layer."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _head_of(name: str, family: str) -> str:
    """What stands in a name up to its last part that is a head, where no layer's number comes before; else empty."""
    parts = name.split(".")
    if parts[0] in _DECODERS.get(family, ()) or _PIXELS.fullmatch(name):
        return parts[0]
    end = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    at = [i for i, part in enumerate(parts[:end]) if part in _HEADS or "classifier" in part]
    return ".".join(parts[: at[-1] + 1]) if at else ""


def _bodies(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """A configuration, and that of its language model; an empty one for each that there is not."""
    found = [config]
    for key in ("text_config", "llm_config", "encoder", "decoder", "vision_config"):
        inner = config.get(key)
        found.append(inner if isinstance(inner, dict) else {})
    return found


def _class_of(config: Mapping[str, object]) -> str:
    """The class that a configuration names first; empty where it names none. transformers 4 writes that of some models
    into the part for their text."""
    for body in _bodies(config)[:2]:
        said = body.get("architectures")
        if isinstance(said, list) and said:
            return str(said[0])
    return ""
