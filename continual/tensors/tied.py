"""Which names of a model are one tensor: output heads tied to input embeddings, and the shared table of encoder-decoder
models.

The canonical name is the one architectures declare (the input embedding); the config says whether heads are tied, its
family's default where it is silent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.tensors.checkpoint import Checkpoint

_TIED_BY_DEFAULT = frozenset(
    [
        "albert",
        "bart",
        "bert",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "bloom",
        "camembert",
        "cohere",
        "cohere2",
        "convbert",
        "ctrl",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "falcon",
        "flaubert",
        "fnet",
        "funnel",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "ibert",
        "layoutlm",
        "led",
        "lfm2",
        "longformer",
        "longt5",
        "luke",
        "m2m_100",
        "mamba",
        "marian",
        "mbart",
        "megatron-bert",
        "mobilebert",
        "modernbert",
        "mpnet",
        "mpt",
        "mt5",
        "mvp",
        "nllb-moe",
        "nomic_bert",
        "openai-gpt",
        "opt",
        "pegasus",
        "pegasus_x",
        "plbart",
        "prophetnet",
        "recurrent_gemma",
        "roberta",
        "roberta-prelayernorm",
        "roformer",
        "smollm3",
        "starcoder2",
        "switch_transformers",
        "t5",
        "umt5",
        "whisper",
        "xglm",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
    ]
)
"""`model_type`s whose config class has tie_word_embeddings = true, read from the classes of transformers 5; a saved
config leaves defaults out."""


class _Group(NamedTuple):
    """Last parts of names that are one tensor, the canonical one first. `head`: only where the config ties the output
    head."""

    canonical: str
    others: tuple[str, ...]
    head: bool = True


_GROUPS = (
    _Group("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), head=False),
    _Group("shared.weight", ("lm_head.weight",)),
    _Group("embed_tokens.weight", ("lm_head.weight", "proj_out.weight")),
    _Group("wte.weight", ("lm_head.weight",)),
    _Group("word_embeddings.weight", ("lm_head.weight",)),
    _Group("embeddings.weight", ("lm_head.weight",)),
    _Group("tokens_embed.weight", ("lm_head.weight",)),
    _Group(
        "embeddings.word_embeddings.weight",
        (
            "cls.predictions.decoder.weight",
            "predictions.decoder.weight",
            "lm_head.decoder.weight",
            "vocab_projector.weight",
            "generator_lm_head.weight",
        ),
    ),
    _Group("cls.predictions.bias", ("cls.predictions.decoder.bias",), head=False),
    _Group("predictions.bias", ("predictions.decoder.bias",), head=False),
    _Group("lm_head.bias", ("lm_head.decoder.bias",), head=False),
)
_BLOCK = 1 << 20


def tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Every other name a tensor of this base may bear, in its files or not, to the canonical one, which is in its
    files.

    Raises Refuse (`tied`) where the config says that two tensors are one and their bytes differ. Where only the
    family's default says so, they are two.
    """
    said = _says(checkpoint.config)
    heads = said if said is not None else checkpoint.config.get("model_type") in _TIED_BY_DEFAULT
    found: dict[str, str] = {}
    for group in _GROUPS:
        if group.head and not heads:
            continue
        for name in checkpoint.tensors:
            if name in found or not (name == group.canonical or name.endswith(f".{group.canonical}")):
                continue
            prefix = name[: -len(group.canonical)]
            for alias in sorted(
                {head + other for other in group.others for head in _prefixes(prefix)} - {name, *found}
            ):
                if alias not in checkpoint.tensors or _same(checkpoint, alias, name):
                    found[alias] = name
                elif group.head and said:
                    raise Refuse(
                        "tied",
                        f"{checkpoint.place}: config.json ties {alias} to {name}, and they differ: "
                        "set tie_word_embeddings = false in it",
                    )
    return found


def _prefixes(prefix: str) -> tuple[str, str, str]:
    """What a head's name may begin with: the head is beside the embedding, beside the model that holds it, or at the
    top."""
    head, _, _ = prefix.rstrip(".").rpartition(".")
    return prefix, f"{head}." if head else "", ""


def _says(config: Mapping[str, object]) -> bool | None:
    for body in (config, config.get("text_config")):
        if isinstance(body, dict) and isinstance(body.get("tie_word_embeddings"), bool):
            return bool(body["tie_word_embeddings"])
    return None


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    buffer = bytearray(_BLOCK)
    digests = []
    for info in (a, b):
        whole = hashlib.sha256()
        for start in range(0, info.nbytes, _BLOCK):
            part = memoryview(buffer)[: min(_BLOCK, info.nbytes - start)]
            checkpoint.read_part(info, start, part)
            whole.update(part)
        digests.append(whole.digest())
    return digests[0] == digests[1]
