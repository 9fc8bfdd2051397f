"""Which names of a model are one tensor: output heads tied to input embeddings, and the shared table of encoder-decoder
models.

The canonical name is the one architectures declare (the input embedding); the config says whether heads are tied, its
family's default where it is silent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from continual.tensors.checkpoints.checkpoint import Checkpoint

_TIED_BY_DEFAULT = frozenset(
    (
        *("albert", "aya_vision", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt"),
        *("blenderbot", "blenderbot-small", "blip", "blip_text_model", "bloom", "camembert", "canary", "cohere"),
        *("cohere2", "cohere2_moe", "cohere2_vision", "cohere_compass_text", "convbert", "csm", "ctrl"),
        *("data2vec-text", "deberta", "deberta-v2", "deepseek_vl", "deepseek_vl_hybrid", "diffusion_gemma"),
        *("distilbert", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe", "esm", "falcon"),
        *("falcon_mamba", "flaubert", "flava", "florence2", "fnet", "fun_asr_nano", "funnel", "gemma", "gemma2"),
        *("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"),
        *("gemma4_unified_assistant", "gemma4_unified_text", "glmasr", "got_ocr2", "gpt2", "gpt_bigcode", "gpt_neo"),
        *("gpt_neox_japanese", "granite_docling", "granite_speech", "granite_speech_plus", "granite_swa", "gte"),
        *("hunyuan_vl", "hyperclovax_vision_v2", "ibert", "internvl", "janus", "jetmoe", "jina_embeddings_v3"),
        *("kimi_k25", "kosmos-2", "kosmos_2_5_text_model", "kosmos_2_text_model", "layoutlm", "led", "lfm2"),
        *("lfm2_moe", "lfm2_vl", "lfm3", "lfm3_vl", "lighton_ocr", "longformer", "longt5", "luke", "lxmert"),
        *("m2m_100", "mamba", "marian", "mbart", "megatron-bert", "minicpm3", "minicpm_ocr", "mistral3"),
        *("mobilebert", "modernbert", "modernbert-decoder", "moonshine", "moss_transcribe_diarize", "mpnet", "mpt"),
        *("mra", "mt5", "mvp", "neomme", "nllb-moe", "nomic_bert", "nystromformer", "openai-gpt", "opt", "ovis2"),
        *("paddleocr_vl", "paligemma", "pe_audio_video", "pegasus", "pegasus_x", "plbart", "pop2piano"),
        *("pp_doclayout_v3", "prophetnet", "qwen3_asr", "recurrent_gemma", "roberta", "roberta-prelayernorm"),
        *("roc_bert", "roformer", "sam", "sam_hq", "seamless_m4t", "seamless_m4t_v2", "smollm3", "speech_to_text"),
        *("speecht5", "squeezebert", "starcoder2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "tapas"),
        *("trocr", "udop", "umt5", "vaultgemma", "vilt", "visual_bert", "voxtral_realtime", "whisper", "xglm", "xlm"),
        *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "yoso", "youtu", "zamba", "zamba2", "zaya"),
    )
)
"""`model_type`s whose config class has tie_word_embeddings = true, read from the classes of transformers 5; a saved
config leaves defaults out."""


_FORCED = frozenset(("t5", "mt5", "umt5", "longt5"))
"""`model_type`s in which transformers 5 ties a head that is not in the file whatever the config says: there
tie_word_embeddings = false means that the decoder's output is not scaled, as in T5 v1.1."""
_SCALED = frozenset(("t5", "longt5", "switch_transformers", "udop", "umt5", "pop2piano"))
"""`model_type`s whose class scales what the head is given where config.json ties it, and only there."""


class _Group(NamedTuple):
    """Last parts of names that are one tensor, the canonical one first. `head`: only where the config ties the output
    head. `families`: only in these `model_type`s."""

    canonical: str
    others: tuple[str, ...]
    head: bool = True
    families: tuple[str, ...] = ()


_PREDICTIONS = (
    *("cls.predictions.decoder.weight", "predictions.decoder.weight", "lm_head.decoder.weight"),
    *("vocab_projector.weight", "generator_lm_head.weight", "mlm_score.decoder.weight"),
)
_BIAS = "relative_bias.biases.0.relative_attention_bias.weight"
_GROUPS = (
    _Group("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), head=False),
    _Group(
        "shared.weight",
        ("text_encoder.embed_tokens.weight", "text_decoder.embed_tokens.weight"),
        head=False,
        families=("seamless_m4t", "seamless_m4t_v2"),
    ),
    _Group("shared.weight", ("lm_head.weight",)),
    _Group("embed_tokens.weight", ("lm_head.weight", "proj_out.weight")),
    _Group("embed_tokens.weight", ("output_projection.weight",), families=("biogpt", "trocr")),
    _Group("embed_tokens.weight", ("lm_head.out_proj.weight",), families=("t5gemma", "t5gemma2")),
    _Group("embed_tokens.weight", ("head.decoder.weight",), families=("ultrabert",)),
    _Group("embed_tokens.weight", ("text_decoder_postnet.lm_head.weight",), families=("speecht5",)),
    _Group("decoder.embed_tokens.weight", ("decoder.output_projection.weight",), families=("fsmt",)),
    _Group("embed_in.weight", ("lm_head.weight", "embed_out.weight")),
    _Group("wte.weight", ("lm_head.weight",)),
    _Group("transformer.w.weight", ("lm_head.weight",), families=("ctrl",)),
    _Group("word_embeddings.weight", ("lm_head.weight",)),
    _Group("word_embedding.weight", ("lm_loss.weight",), families=("xlnet",)),
    _Group("embeddings.weight", ("lm_head.weight",)),
    _Group("embeddings.weight", ("pred_layer.proj.weight",), families=("flaubert", "xlm")),
    _Group("embeddings.weight", ("head.weight",), families=("rwkv",)),
    _Group("tok_embeddings.weight", ("decoder.weight", "lm_head.weight")),
    _Group("tokens_embed.weight", ("lm_head.weight",)),
    _Group("codec_embedding.weight", ("codec_head.weight",)),
    _Group("embeddings.word_embeddings.weight", _PREDICTIONS),
    _Group("embeddings.word_embeddings.weight", ("output.weight",), families=("git",)),
    *(
        _Group(f"{head}.bias", (f"{head}.decoder.bias",))
        for head in ("cls.predictions", "lm_head", "text_decoder.cls.predictions")
    ),
    _Group("predictions.bias", ("predictions.decoder.bias",), families=("albert",)),
    _Group("entity_embeddings.entity_embeddings.weight", ("entity_predictions.decoder.weight",), families=("luke",)),
    _Group("embedding_projection.weight", ("unembedding_projection.weight",), families=("neomme",)),
    _Group(
        "encoder.text_model.embed_tokens.weight", ("decoder.embed_tokens.weight",), head=False, families=("t5gemma2",)
    ),
    _Group(
        "word_embeddings.weight",
        ("encoder.word_embeddings.weight", "decoder.word_embeddings.weight"),
        head=False,
        families=("prophetnet",),
    ),
    _Group(
        "depth_decoder.model.embed_tokens.weight",
        ("backbone_model.embed_tokens.embed_audio_tokens.weight",),
        head=False,
    ),
    _Group("text_embeddings.word_embeddings.weight", ("mlm_score.decoder.weight",), families=("vilt",)),
    *(
        _Group(f"{head}.decoder.bias", (f"{head}.bias",), head=False, families=("flava",))
        for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head")
    ),
    _Group("patch_embed.proj.weight", ("encoder.embed_patches.proj.weight",), head=False, families=("udop",)),
    _Group("patch_embed.proj.bias", ("encoder.embed_patches.proj.bias",), head=False, families=("udop",)),
    _Group(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (f"encoder.{_BIAS}", f"decoder.{_BIAS}"),
        head=False,
        families=("udop",),
    ),
    _Group("cls.predictions.bias", ("cls.predictions.decoder.bias",), head=False),
    _Group("predictions.bias", ("predictions.decoder.bias",), head=False),
    _Group("lm_head.bias", ("lm_head.decoder.bias",), head=False),
)
_HEADS = {
    **dict.fromkeys(("whisper", "moonshine", "canary", "cohere_asr"), "proj_out.weight"),
    **dict.fromkeys(
        ("bert", "deberta", "deberta-v2", "ernie", "fnet", "layoutlm", "mobilebert", "nomic_bert", "roformer"),
        "cls.predictions.decoder.weight",
    ),
    **dict.fromkeys(
        ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "longformer", "esm", "ibert", "gte"),
        "lm_head.decoder.weight",
    ),
    **dict.fromkeys(("electra", "convbert"), "generator_lm_head.weight"),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), "decoder.weight"),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection.weight"),
    **dict.fromkeys(("flaubert", "xlm"), "pred_layer.proj.weight"),
    **dict.fromkeys(("t5gemma", "t5gemma2"), "lm_head.out_proj.weight"),
    "distilbert": "vocab_projector.weight",
    "albert": "predictions.decoder.weight",
    "gpt_neox_japanese": "embed_out.weight",
    "xlnet": "lm_loss.weight",
    "rwkv": "head.weight",
}
"""What the head is called, by `model_type`, where it is not lm_head.weight."""
_LANGUAGE = re.compile(r"CausalLM|LMHead|Generation|MaskedLM|PreTraining|ForSpeechTo|ForTextTo|^(?:U?M?T5|M?Bart)")
"""Classes that use a table in two places."""
_BLOCK = 1 << 20
_PLACES, _SAMPLE = 8, 4096
"""Places of two tables that are compared where the base is not read, and the bytes at each."""


def tied(checkpoint: Checkpoint, tables: Collection[str] = (), *, sampled: bool = False) -> dict[str, str]:
    """Every other name a tensor of this base may bear, in its files or not, to the canonical one, which is in its
    files. What is named in `tables` is a tensor by itself, whatever the config says: a state keeps it so.

    Where two that the config or the family says to be one are both there and differ, the file is right: each is a
    table by itself, as transformers loads it. `sampled`: a few bytes at places spread over the two are compared, not
    all of them, where no weight of the base is to be read.
    """
    found: dict[str, str] = {}
    pairs = list(_candidates(checkpoint.tensors, checkpoint.config))
    own = {alias for alias, _, _ in pairs if alias in tables}
    headless: set[str] = set()
    for alias, name, head in pairs:
        if alias not in checkpoint.tensors or alias in found or name in found or alias in own:
            continue
        if (head and _keeps_apart(checkpoint.config)) or not _same(checkpoint, alias, name, sampled):
            own.add(alias)
            headless.update((name,) if head else ())
        else:
            found[alias] = name
    for alias, name, head in pairs:
        if alias in checkpoint.tensors or alias in found or name in found or alias in own:
            continue
        if head and name in headless:
            continue  # another name of a head that is there by itself
        if any(alias.endswith(f".{table}") or table.endswith(f".{alias}") for table in own):
            continue  # another place where the same head could be
        found[alias] = name
    return found


def tables_apart(checkpoint: Checkpoint, aliases: Mapping[str, str], untied: Collection[str] = ()) -> bool:
    """Whether what an export of this base has is two tables, of the words and of the head, that its config says to be
    one: because they differ in the files, or the state keeps them apart (`untied`). `aliases`: what `tied` found. The
    word of the T5 family says something else, and stays."""
    if str(checkpoint.config.get("model_type")) in _FORCED:
        return False
    if untied:
        return True
    pairs = _candidates(checkpoint.tensors, checkpoint.config) if ties_heads(checkpoint.config) else ()
    return any(
        head and alias in checkpoint.tensors and alias not in aliases and name not in aliases
        for alias, name, head in pairs
    )


def _keeps_apart(config: Mapping[str, object]) -> bool:
    """Whether a head that is in the file is a table by itself, in a family that ties any other."""
    return str(config.get("model_type")) in _FORCED and _says(config) is False


def with_tables(checkpoint: Checkpoint, tables: Collection[str]) -> tuple[Checkpoint, dict[str, str]]:
    """The same checkpoint, in which every name of `tables` that is not in its files is there with the bytes of the
    tensor that it is tied to; and those of `tables` that are tied, with what they are tied to."""
    said: dict[str, str] = {}
    for alias, name, _ in _candidates(checkpoint.tensors, checkpoint.config):
        if alias in tables and name not in said:
            said.setdefault(alias, name)
    more = {name: checkpoint.tensors[of]._replace(name=name) for name, of in said.items()}
    if more.keys() <= checkpoint.tensors.keys():
        return checkpoint, said
    return checkpoint.with_tensors({**more, **checkpoint.tensors}), said


def other_table(base: Checkpoint, aliases: Mapping[str, str], name: str) -> str | None:
    """Another name under which the table `name` of a base is used by its class; None where it is the only one. A class
    that config.json names, and that has no language-model head, has none of a head."""
    names = sorted(alias for alias, of in aliases.items() if of == name and alias.endswith(".weight"))
    present = [alias for alias in names if alias in base.tensors]
    said = base.config.get("architectures")
    if isinstance(said, list) and said and not any(_LANGUAGE.search(str(word)) for word in said):
        return present[0] if present else None
    word = _HEADS.get(str(base.config.get("model_type")), "lm_head.weight")
    return next(iter(present), word if word in names else next(iter(names), None))


def head_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The output head of a base that is tied to its input embedding, by the name that its class has for it, to that of
    the embedding; empty where no head is tied."""
    aliases = tied(checkpoint)
    present = {name: of for name, of in aliases.items() if name in checkpoint.tensors}
    word = _HEADS.get(str(checkpoint.config.get("model_type")), "lm_head.weight")
    for found in (present, aliases):
        heads = sorted(name for name in found if name == word or (found is present and name.endswith(word)))
        if heads:
            return {heads[0]: found[heads[0]]}
    return {}


def untied(checkpoint: Checkpoint) -> dict[str, str]:
    """Every tensor that the class of a base makes anew where nothing is tied, and that is one with another while
    something is: the head, its bias, and the tables of encoder and decoder; to that other. Empty where no head is tied.
    """
    heads = head_of(checkpoint)
    aliases = tied(checkpoint)
    for head, table in list(heads.items()):
        bias = f"{head.removesuffix('.weight')}.bias"
        if bias in aliases:
            heads[bias] = aliases[bias]
        first = table.removesuffix("shared.weight")
        for alias, of in aliases.items():
            if of == table != first and alias in (
                f"{first}encoder.embed_tokens.weight",
                f"{first}decoder.embed_tokens.weight",
            ):
                heads[alias] = of
    return heads


def can_untie(config: Mapping[str, object]) -> bool:
    """Whether a model answers the same with its head as a table of its own."""
    return str(config.get("model_type")) not in _SCALED


def ties(names: Collection[str], config: Mapping[str, object]) -> dict[str, str]:
    """What `tied` says of a checkpoint that has tensors of these names, if those that are one are equal."""
    found: dict[str, str] = {}
    for alias, name, head in _candidates(names, config):
        apart = head and alias in names and _keeps_apart(config)
        if alias not in found and name not in found and not apart:
            found[alias] = name
    return found


def ties_heads(config: Mapping[str, object]) -> bool:
    """Whether a config ties the output head to the input embedding, by its word or that of its family."""
    said = _says(config)
    return said if said is not None else str(config.get("model_type")) in _TIED_BY_DEFAULT


def _candidates(names: Collection[str], config: Mapping[str, object]) -> Iterator[tuple[str, str, bool]]:
    """Names that can be one tensor, the other one and the canonical; and whether the other is an output head's."""
    family = str(config.get("model_type"))
    heads = ties_heads(config) or family in _FORCED
    for group in _GROUPS:
        if (group.head and not heads) or (group.families and family not in group.families):
            continue
        for name in names:
            if not (name == group.canonical or name.endswith(f".{group.canonical}")):
                continue
            prefix = name[: -len(group.canonical)]
            for alias in sorted({head + other for other in group.others for head in _prefixes(prefix)} - {name}):
                yield alias, name, group.head and name.endswith(".weight")


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


def _same(checkpoint: Checkpoint, one: str, other: str, sampled: bool) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.shape, a.dtype, a.nbytes) != (b.shape, b.dtype, b.nbytes):
        return False
    if sampled and a.nbytes > _PLACES * _SAMPLE:
        last = a.nbytes - _SAMPLE
        starts, length = [last * place // (_PLACES - 1) for place in range(_PLACES)], _SAMPLE
    else:
        starts, length = list(range(0, a.nbytes, _BLOCK)), _BLOCK
    first, second = bytearray(length), bytearray(length)
    for start in starts:
        parts = [memoryview(whole)[: min(length, a.nbytes - start)] for whole in (first, second)]
        for info, part in zip((a, b), parts, strict=True):
            checkpoint.read_part(info, start, part)
        if parts[0] != parts[1]:
            return False
    return True
