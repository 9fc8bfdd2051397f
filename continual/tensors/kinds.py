"""Which tensors of a base are matrices, plain or carried, how deep each lies, and which names are tied: by name and config, never by shape alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from continual.errors import Refuse
from continual.records import Kind, TensorSpec
from continual.tensors.checkpoint import FLOATS, Checkpoint

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|embed_in|tok_embeddings|wte|wpe|shared|embed|embeddings|word_embeddings|word_embeddings_layernorm|token_type_embeddings"
    r"|position_embeddings|relative_attention_bias|rel_pos_bias|embedding|pos_embed|position_embedding|token_embedding|class_embedding|cls_token|positional_embedding)(\.weight)?$"
    r"|(^|\.)embeddings\."
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|classifier|score|qa_outputs|head|text_projection|visual_projection|logit_scale|pre_classifier|cls\.predictions\.decoder"
    r"|cls\.seq_relationship)(\.|$)"
)
_NORM = re.compile(r"(^|\.)(\w*norm\w*|ln_?\w*|LayerNorm)(\.|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)\.")
_TIED_BY_DEFAULT = frozenset(
    "albert bart bert bloom deberta deberta-v2 distilbert electra falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_neo mbart mobilebert mpnet mpt mt5 opt "
    "pegasus roberta t5 xlm-roberta".split()
)
_TIES: Sequence[Sequence[str]] = (
    ("embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight", "vocab_projector.weight"),
    ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    ("decoder.embed_tokens.weight", "lm_head.weight"),
    ("word_embeddings.weight", "lm_head.weight"),
)
"""Groups of names that are one tensor where the config ties them, each as the last parts of a name; the first is canonical."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base and what is known of its tensors: `specs` in name order, `aliases` from a tied name (present or not) to its canonical one."""

    checkpoint: Checkpoint
    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]


def describe(checkpoint: Checkpoint, *, plain: Sequence[str] = (), exclude: Sequence[str] = ()) -> BaseModel:
    """Kinds, depths and ties of a base. `plain` and `exclude` are globs of names. Raises Refuse for a float dtype that cannot be folded."""
    aliases = _aliases(checkpoint)
    names = sorted(name for name in checkpoint.tensors if name not in aliases)
    layers = max((int(m[1]) for name in names if (m := _LAYER.search(name))), default=0) + 1
    specs = []
    for name in names:
        info = checkpoint.tensors[name]
        kind = kind_of(name, info.shape, info.dtype, plain, exclude)
        if kind != "carried" and info.dtype not in FLOATS:
            raise Refuse("dtype", f"{checkpoint.path}: tensor {name} is {info.dtype}: convert it to F32, F16 or BF16, or carry it with exclude")
        specs.append(TensorSpec(name, info.shape, info.dtype, kind, depth_of(name, layers)))
    return BaseModel(checkpoint, tuple(specs), aliases)


def kind_of(name: str, shape: Sequence[int], dtype: str, plain: Iterable[str] = (), exclude: Iterable[str] = ()) -> Kind:
    """`carried`: integers, bools and what `exclude` names. `matrix`: 2-D and 4-D weights that are no embedding, head or norm. `plain`: the rest."""
    if _matches(name, exclude) or not dtype.startswith(("F", "BF")):
        return "carried"
    if len(shape) not in (2, 4) or _matches(name, plain) or is_vocabulary(name) or _NORM.search(name):
        return "plain"
    return "matrix"


def is_vocabulary(name: str) -> bool:
    """Whether a name is that of an embedding or an output head, whose first axis may be a vocabulary."""
    return bool(_EMBEDDING.search(name) or _HEAD.search(name))


def depth_of(name: str, layers: int) -> float:
    """A tensor's place in the stack: 0 before the layers and in the first, 1 in the last and after them."""
    if match := _LAYER.search(name):
        return int(match[1]) / max(1, layers - 1)
    return 0.0 if _EMBEDDING.search(name) else 1.0


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _aliases(checkpoint: Checkpoint) -> dict[str, str]:
    """Tied names to canonical ones, if the config ties input and output embeddings."""
    if not _tied(checkpoint.config):
        return {}
    names = checkpoint.tensors
    found: dict[str, str] = {}
    for first, *others in _TIES:
        for name in names:
            if name not in found and (name == first or name.endswith("." + first)):
                prefix = name[: -len(first)]
                # the head stands beside the model (lm_head) as often as inside it (model.lm_head)
                for other in others:
                    found |= {alias: name for alias in {prefix + other, other, _parent(prefix) + other} if alias != name and _same(checkpoint, alias, name)}
    return found


def _same(checkpoint: Checkpoint, alias: str, name: str) -> bool:
    return alias not in checkpoint.tensors or checkpoint.tensors[alias].shape == checkpoint.tensors[name].shape


def _parent(prefix: str) -> str:
    head, _, _ = prefix.rstrip(".").rpartition(".")
    return f"{head}." if head else ""


def _tied(config: Mapping[str, Any]) -> bool:
    for body in (config, config.get("text_config") or {}):
        if isinstance(body, dict) and "tie_word_embeddings" in body:
            return bool(body["tie_word_embeddings"])
    return config.get("model_type") in _TIED_BY_DEFAULT
