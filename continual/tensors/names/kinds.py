"""Which tensors of a base are matrices, stacks of them, plain or carried and how deep each lies: by the names
architectures use, never by shape alone.

Which names are one tensor is in ties.py.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from continual.errors import Misconfigured, Refuse
from continual.records import Kind, TensorSpec, over_pixels
from continual.tensors.checkpoints.checkpoint import FLOATS, Checkpoint
from continual.tensors.names.tied import tied, with_tables

_WORDS = re.compile(
    r"(^|\.)(embed_tokens|embed_in|tok_embeddings|wte|shared|word_embeddings?|token_embedding|embed_out|lm_head"
    r"|generator_lm_head|vocab_projector|pred_layer\.proj|output_projection|output_layer|predictions(\.decoder)?"
    r"|lm_head\.decoder)\.(weight|bias)$"
    r"|(^|\.)embeddings\.weight$|^(output|proj_out)\.weight$"
)
"""Tables with a row for each word: input embeddings and language-model heads. Their rows are what `vocab` is about."""
_WORDS_TOO = re.compile(r"(^|\.)(embed_tokens_per_layer\.weight|decoder\.(weight|bias))$")
"""Tables that have a row for each word where they are as long as the tables of `_WORDS`: of Gemma 3n, of ModernBERT."""
_LONGEST_WORDS = 80
"""Characters at the end of a name in which all of `_WORDS` lies."""
_TABLE = re.compile(
    r"(^|\.)(wpe|emb|embed|[a-z0-9_]*embed(ding)?s?|embed_[a-z0-9_]*(?<!proj)(?<!norm)|relative_attention_bias"
    r"|embedding_table|rel_pos_bias|pos_emb|mask_emb)(\.weight)?$"
    r"|(^|\.)embeddings\.(?!.*(patch|proj|dense)).*"
)
"""Other embeddings: of positions, segments, classes."""
_POSITIONS = re.compile(
    r"(^|[._])(wpe|embed_positions|pos(ition)?(al)?_?(emb\w*|bias\w*|table)|relative_position_bias_table)(\.|$)"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|classifier|score|qa_outputs|heads?|pre_classifier|vocab_transform|logits_proj|text_projection"
    r"|visual_projection|seq_relationship)(\.|$)"
    r"|^fc\.weight$"
)
_STACK = re.compile(
    r"(?:^|\.)(?:shared_)?experts\.(?!\d)|(?:^|\.)(?:block_sparse_moe|mlp|moe)\.(?:input|output)_linear\.weight$"
    r"|(?:^|\.)moe\.(?:gate|up|down)_proj\.weight$|(?:^|\.)mlp\.shared_w(?:13|2)_weight$"
)
"""Packed experts in 3-D, one after the other: `experts.gate_up_proj`; `block_sparse_moe.input_linear.weight` of Granite
and JetMoE. A number behind `experts.` is one expert alone."""
_FLAT_STACK = re.compile(r"(?:^|\.)experts\.mlp\.(?:w1|v1|w2)$")
"""Packed experts of DBRX, in 2-D: the rows of all experts, one after the other. The config says how many there are."""
_WEIGHT = re.compile(r"[._]weight$")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)\.")
_BEFORE = re.compile(
    r"(^|[._])(embed(?!_out)\w*|emb|wte|wpe|shared|patch\w*|cls_token|pos|position\w*|pre_?la?yr?norm|ln_pre|stem"
    r"|conv_in|project_in|conv1)(\.|$)"
)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class BaseModel:
    """A base and what is known of its tensors: `specs` in name order, `aliases` from a tied name (in its files or not)
    to its canonical one. `untied`: from a name that is a tensor by itself here to that which it is tied to in the
    files."""

    checkpoint: Checkpoint
    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    untied: Mapping[str, str] = field(default_factory=dict)


def describe(
    checkpoint: Checkpoint,
    *,
    plain: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tables: Collection[str] = (),
    sampled: bool = False,
) -> BaseModel:
    """Kinds, depths and ties of a base. `plain` and `exclude` are globs of names; what `tables` names is a tensor by
    itself, though it be tied to another: a head that is not in the files has the values of the embedding then.

    Reads nothing but headers, except where tied names are both there: their bytes are compared, some of them if
    `sampled`. Raises Refuse for a
    float dtype that cannot be folded and for tied tensors that differ, Misconfigured for a glob that names no tensor.
    """
    aliases = tied(checkpoint, tables, sampled=sampled)
    checkpoint, untied = with_tables(checkpoint, tables)
    names = sorted(name for name in checkpoint.tensors if name not in aliases)
    for glob in (*plain, *exclude):
        if not fnmatch.filter(names, glob):
            raise Misconfigured(
                f"{glob!r} names no tensor of {checkpoint.place}; 'continual init' without it lists them"
            )
    stacks: dict[str, int] = {}
    for name in names:
        if match := _LAYER.search(name):
            stacks[name[: match.start(1)]] = max(stacks.get(name[: match.start(1)], 0), int(match[1]))
    specs = []
    for name in names:
        info = checkpoint.tensors[name]
        kind = kind_of(name, info.shape, info.dtype, plain, exclude)
        experts = (
            stack_of(name, info.shape, checkpoint.config) if kind != "carried" and not _matches(name, plain) else 0
        )
        if kind != "carried" and info.dtype not in FLOATS:
            raise Refuse(
                "dtype",
                f"{checkpoint.place}: tensor {name} is {info.dtype}: "
                "convert it to F32, F16 or BF16, or carry it with exclude",
            )
        kind = "stack" if experts else kind
        specs.append(TensorSpec(name, info.shape, info.dtype, kind, depth_of(name, stacks), experts))
    return BaseModel(checkpoint, tuple(specs), aliases, untied)


def kind_of(
    name: str, shape: Sequence[int], dtype: str, plain: Iterable[str] = (), exclude: Iterable[str] = ()
) -> Kind:
    """`carried`: integers, bools and what `exclude` names. `matrix`: weights of linear layers (2-D) and convolutions
    (4-D). `plain`: the rest, stacks of matrices among it (`stack_of`), and what `sees_pixels`."""
    if _matches(name, exclude) or not dtype.startswith(("F", "BF")):
        return "carried"
    if len(shape) not in (2, 4) or 0 in shape or not _WEIGHT.search(name) or _matches(name, plain):
        return "plain"
    table = len(shape) == 2 and (
        is_vocabulary(name) or _TABLE.search(name)
    )  # an embedding in 4-D is a convolution over patches
    return "plain" if table or _HEAD.search(name) or sees_pixels(name, shape) else "matrix"


def sees_pixels(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the convolution by which a model sees an image: over its patches, or a stem
    (ops/decisions/0092)."""
    return over_pixels(shape) and _BEFORE.search(name) is not None


def stack_of(name: str, shape: Sequence[int], config: Mapping[str, object]) -> int:
    """How many matrices of one shape a tensor is, where it holds packed experts; 0 where it is something else."""
    if 0 in shape:
        return 0
    if len(shape) == 3:
        return shape[0] if _STACK.search(name) else 0
    inner = config.get("ffn_config")
    count = inner.get("moe_num_experts") if isinstance(inner, dict) else None
    if len(shape) != 2 or config.get("model_type") != "dbrx" or not _FLAT_STACK.search(name):
        return 0
    return count if isinstance(count, int) and count > 0 and shape[0] % count == 0 else 0


def as_made(specs: Sequence[TensorSpec], made: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of a base as the state has them that was made of it: what is a stack now was plain in the states of
    earlier versions, and what sees pixels was a matrix; both stay so there."""
    kinds = {spec.name: spec.kind for spec in made}

    def as_it_was(spec: TensorSpec) -> TensorSpec:
        kind = kinds.get(spec.name)
        if spec.kind == "stack" and kind == "plain":
            return replace(spec, kind="plain", experts=0)
        return replace(spec, kind="matrix") if spec.pixels and kind == "matrix" else spec

    return tuple(as_it_was(spec) for spec in specs)


def is_vocabulary(name: str) -> bool:
    """Whether a name is that of an input embedding or a language model's head, whose first axis is the vocabulary."""
    return bool(_WORDS.search(name, max(0, len(name) - _LONGEST_WORDS)))  # the end decides; `^` is the true beginning


def is_positions(name: str) -> bool:
    """Whether a name is that of a table with a row for each position."""
    return bool(_POSITIONS.search(name))


def vocabularies(specs: Iterable[TensorSpec]) -> frozenset[str]:
    """The names of all tensors of a base that have a row for each word."""
    listed = list(specs)
    found = {spec.name: spec.shape[:1] for spec in listed if is_vocabulary(spec.name)}
    lengths = set(found.values())
    more = (s.name for s in listed if s.shape[:1] in lengths and _WORDS_TOO.search(s.name))
    return frozenset((*found, *more))


def depth_of(name: str, stacks: Mapping[str, int]) -> float:
    """A tensor's place in its stack: 0 before the layers and in the first, 1 in the last and after them.

    `stacks`: what stands before a layer's number to the highest number in that stack (an encoder and a decoder are
    two).
    """
    if match := _LAYER.search(name):
        return int(match[1]) / max(1, stacks[name[: match.start(1)]])
    return 0.0 if _BEFORE.search(name) else 1.0


def layer_in(name: str) -> str:
    """The layer that a tensor is in, as `model.layers.3`; its own name where it is in none."""
    match = _LAYER.search(name)
    return name[: match.end(1)] if match else name


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
