"""Which tensors of a base PEFT can adapt, and what it calls the modules that have them.

What a plain LoRA cannot hold is left out: norms, biases, convolutions, anything that
is not 2-D; position tables of classes of their own, whose forward is no look-up; weights that torch reads past a
wrapper (nn.MultiheadAttention); experts and their routers, which transformers 5 keeps in 3-D tensors; an embed_out
that is not loaded as lm_head, as GPT-NeoX's is; and a table that is tied to the output head. Of that PEFT would adapt
the embedding alone and leave the head at the base; wrapping both by the same product gives the right logits, but then
PEFT's merge_and_unload adds it twice to the one shared weight. A silent doubling is worse than an error that is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from continual.records import TensorSpec
from continual.tensors import BaseModel
from continual.tensors.names.conv1d import CONV1D
from continual.tensors.names.kinds import is_vocabulary, kind_of
from continual.tensors.names.renaming import family_of, loaded

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|tok_embeddings|tokens_embed|positions_embed|wte|wpe|shared|word_embeddings?"
    r"|token_embedding|position_embeddings?|token_type_embeddings|relative_attention_bias|embeddings|embedding_table)"
    r"\.weight$"
)
"""Tables that are nn.Embedding, or scale its output as PEFT knows to: a look-up by ids, and nothing else in their
forward."""
_HEAD = re.compile(
    r"(^|\.)(classifier|score|qa_outputs|heads?|pre_classifier|vocab_transform|logits_proj|text_projection"
    r"|visual_projection|seq_relationship)\.|^fc\."
)
"""Heads that the rules treat as plain tensors, and that are nn.Linear all the same."""
_ROUTER = re.compile(r"\.router(\.layer)?\.weight$")
"""Routers of experts that are no nn.Linear once they are loaded."""
_STATE_SPACE = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
"""`model_type`s of which PEFT refuses `out_proj` and `conv1d`, which their kernels read past the module."""
_OF_EXPERTS = frozenset(("gate_proj", "up_proj", "down_proj"))
"""Layers that PEFT takes for the packed experts', by their names, in the families `_MIXED`: dense ones beside them
cannot be adapted there."""
_MIXED = frozenset(
    (
        "afmoe",
        "bailing_hybrid",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "hy_v3",
        "longcat_flash",
        "mimo_v2_flash",
        "olmoe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "solar_open",
    )
)
_INNER = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model."}
"""Where a model with a head has its inner model, of families whose published files often are the inner model's alone
and are loaded with a head."""


class Adapted(NamedTuple):
    """A tensor that an adapter can adapt, and the module that has it. `transposed`: whether B·A is the transpose of the
    weight, as PEFT has it for embeddings and Conv1D. `factors`: what A and B are called in a layout other than PEFT's,
    and `alpha` what a tensor with the scale times the rank is."""

    spec: TensorSpec
    module: str
    embedding: bool
    transposed: bool
    factors: tuple[str, str] | None = None
    alpha: str | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of B·A."""
        rows, columns = self.spec.shape[0], math.prod(self.spec.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def names(self) -> tuple[str, str]:
        """What A and B are called in the file."""
        if self.factors is not None:
            return self.factors
        of = "lora_embedding_{}" if self.embedding else "lora_{}.weight"
        return f"base_model.model.{self.module}.{of.format('A')}", f"base_model.model.{self.module}.{of.format('B')}"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B in the file; those of a convolution are convolutions."""
        rows, columns = self.sides
        if len(self.spec.shape) == 2:
            return (rank, columns), (rows, rank)
        return (rank, *self.spec.shape[1:]), (rows, rank, *(1 for _ in self.spec.shape[2:]))


def adaptable(base: BaseModel) -> tuple[Adapted, ...]:
    """The tensors of a base that PEFT can adapt as nn.Linear, Conv1D or nn.Embedding, in name order. From names and
    shapes alone. Modules are called what transformers 5 calls them in the loaded model.
    """
    config = base.checkpoint.config
    present = {spec.name for spec in base.specs}
    tied = set(base.aliases.values())
    conv1d = CONV1D.get(family_of(config), frozenset())
    blocks = {name.partition(".experts.")[0] for name in present if ".experts." in name}
    routers = {f"{block}.{word}.weight" for block in blocks for word in ("gate", "router")}
    mixed = family_of(config) in _MIXED
    inner = _inner(base, present)
    found = []
    for spec in base.specs:
        name = spec.name
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        if len(spec.shape) != 2 or not spec.numel or spec.kind == "carried" or name in tied:
            continue
        module = loaded(inner + name, config)
        if not module.endswith(".weight") or not name.endswith(".weight"):
            continue
        if (
            ".experts." in name
            or name in routers
            or _ROUTER.search(name)
            or (own == "out_proj" and family_of(config) in _STATE_SPACE)
            or (own in _OF_EXPERTS and mixed)
            or module.endswith("embed_out.weight")
            or (own == "out_proj" and f"{parent}.in_proj_weight" in present)
        ):
            continue
        embedding = _EMBEDDING.search(name) is not None
        # by the name alone: what the user's globs made plain is a linear layer as before
        if embedding or is_vocabulary(name) or _HEAD.search(name) or kind_of(name, spec.shape, spec.dtype) == "matrix":
            found.append(Adapted(spec, module.removesuffix(".weight"), embedding, embedding or own in conv1d))
    return tuple(found)


def _inner(base: BaseModel, present: Iterable[str]) -> str:
    """What the loaded model's module names have in front of the names in the files: empty but for the files of an inner
    model loaded with a head."""
    config = base.checkpoint.config
    inner = _INNER.get(str(config.get("model_type")), "")
    listed = config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    bare = not architecture or re.search(r"(?<!LMHead)(?<!DoubleHeads)Model$", architecture)
    return "" if bare or any(name.startswith(inner) for name in present) else inner
