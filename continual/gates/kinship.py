"""Whether the name of a base in an adapter's configuration can be that of the state's base: by the words alone, no Hub
is asked.

Copies, mirrors and quantised variants of a model bear its name with marks of their own (`-bnb-4bit`, `-GPTQ`). These
are taken off, and what is left is compared without the name of the owner. A path says nothing, since the same model
lies under another one elsewhere.
"""

from __future__ import annotations

import re

from continual.errors import Refuse
from continual.gates.contract import Headers
from continual.outside import shown
from continual.tensors import Adapter
from continual.tensors.adapters.loras.architecture import kinds_of, told_by
from continual.tensors.adapters.loras.file import LoraFile

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"(?:^|/)models--(?P<owner>[^/]+?)--(?P<name>[^/]+)(?:/|$)")
_MARK = re.compile(
    r"[-_.](?:unsloth|bnb|nf4|fp4|[2-8]-?bits?|int[248](?:wo)?|uint4|[248]bpw|gptq(?:-int[48])?|awq|eetq|aqlm|hqq"
    r"|exl[23]|gguf|ggml|mlx|onnx|openvino|marlin|autoround|auto-round|torchao|quanto|quantized|quantised"
    r"|fp8(?:-kv|-block)?|nvfp4(?:a16)?|mxfp[48]|dynamic|static|tensorwise|a?sym|dwq|w[2-8]a(?:4|8|16)"
    r"|gs?(?:32|64|128)|(?:32|64|128)g|actorder(?:_true|_false)?|[124]x(?:8|15|16)|q[2-8](?:_[a-z0-9]+)*"
    r"|i?q\d_k(?:_[sml])?|bf16|fp16|fp32|f16|f32|hf|safetensors|imatrix|i1)$"
)
_ALIASES = {
    "mistral-7b": "mistral-7b-v0.1",
    "mistral-7b-instruct": "mistral-7b-instruct-v0.1",
    "zephyr-sft": "mistral-7b-sft-beta",
    "tinyllama": "tinyllama-1.1b-intermediate-step-1431k-3t",
    "tinyllama-chat": "tinyllama-1.1b-chat-v1.0",
    "phi-3-medium-4k": "phi-3-medium-4k-instruct",
}
"""Names of mirrors that taking marks off does not lead back."""


def check_name(seen: Headers) -> None:
    """Raises Refuse (`lineage`) where an adapter names a repo that is another model than the base, or says that it is
    for another kind of model. A base that did not come from the Hub has no name to compare."""
    if not isinstance(seen.model, Adapter):
        return
    if isinstance(seen.model, LoraFile):
        _check_kind(seen, seen.model)
        return
    theirs = repo_of(seen.model.config.body.get("base_model_name_or_path"))
    ours = seen.repo or repo_of(str(seen.base.checkpoint.place))
    if theirs is not None and ours is not None and is_other(theirs, ours):
        raise Refuse(
            "lineage",
            f"{seen.model.config.where}: base_model_name_or_path = {shown(theirs)} is another model than the base of "
            f"this state, {ours}; if it is the same one under another name, set lineage = shapes",
            by=("lineage",),
        )


def _check_kind(seen: Headers, file: LoraFile) -> None:
    """Raises Refuse (`lineage`) where a LoRA file is for another kind of diffusion model than the base."""
    told, ours = told_by(file), kinds_of(seen.base)
    if told is not None and ours and told.kind not in ours:
        raise Refuse(
            "lineage",
            f"{file.file}: is a LoRA of {told.kind} ({told.by}), and the base of this state is "
            f"{' or '.join(sorted(ours))}; if the file is mistaken, set lineage = shapes",
            by=("lineage",),
        )


def repo_of(word: object) -> str | None:
    """The repo `owner/name` that a configuration names, also as a path in the cache of the Hub's client; None for a
    path, and for what is no name."""
    if not isinstance(word, str):
        return None
    if found := _CACHED.search(word):
        return f"{found['owner']}/{found['name']}"
    return word if _REPO.fullmatch(word) else None


def is_other(named: str, base: str) -> bool:
    """Whether two repos (`owner/name`) are two models, as far as their names tell."""
    return stem(named) != stem(base)


def stem(repo: str) -> str:
    """The name of a repo without its owner and without the marks of mirrors and of quantisation, in small letters."""
    name = repo.rpartition("/")[2].lower().removeprefix("meta-")
    while (bare := _MARK.sub("", name)) != name and bare:
        name = bare
    return _ALIASES.get(name, name)
