"""How adapters lie in directories, as people publish them: beside a full model, in folders of a repo, with weights
beside them that no adapter holds. What cannot be read is said in one line, by the names of the files alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from continual.errors import Refuse
from continual.outside import shown
from continual.tensors.adapters.adapter import WEIGHTS, weights_in
from continual.tensors.adapters.adapter_config import CONFIG
from continual.tensors.checkpoints.checkpoint import INDEX, SINGLE
from continual.tensors.checkpoints.place import Place

VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
"""Heads of a reward model or of PPO that trainers put beside an adapter: no base has one, and they stay out."""
_BESIDE = re.compile(
    r"(?:.*trainable.*|.*projector.*|.*embed(?:ding)?s?|learned_.*|vit|embed_tokens|lm_head)"
    r"\.(?:safetensors|bin|pt|pth)",
    re.IGNORECASE,
)
"""Weights that trainers put beside an adapter, and that belong to what was trained: `non_lora_trainables.bin` of LLaVA,
`trainable_params.bin` of LongLoRA, `vit.safetensors` of ms-swift."""
_ADAPTER_HUB = "pytorch_adapter.bin"
_LISTED = 3
_LOOKED = 200


def check_adapter(place: Place) -> None:
    """Raises Refuse unless a directory with an adapter's configuration holds one adapter and no other trained weights:
    `adapter-kind`, `pickle`, `no-weights`."""
    names = place.names()
    if full := next((name for name in (SINGLE, INDEX) if name in names), None):
        raise Refuse(
            "adapter-kind",
            f"{place}: holds both an adapter ({CONFIG}) and a full model ({full}), and nothing says which is meant; "
            "publish them in two directories",
        )
    if weights_in(names) not in names:
        raise _lacking(place, names)
    if beside := sorted(name for name in names if _BESIDE.fullmatch(name)):
        raise Refuse(
            "adapter-kind",
            f"{place}: {shown(beside[0])} has weights that were trained beside the adapter, and that PEFT does not "
            "load with it; merge both into the base with the trainer that wrote them, and publish the whole model",
        )


def check_elsewhere(place: Place) -> None:
    """Raises Refuse (`no-weights`) where a directory has no weights, and folders in it have some."""
    if place.only is not None:
        return
    names = place.names()
    if any(name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth", INDEX)) for name in names):
        return
    inner = {file.name.partition("/")[0] for file in place.look() if "/" in file.name}
    found = []
    for folder in sorted(inner | set(names))[:_LOOKED]:
        within = place.names(folder)
        if CONFIG in within or SINGLE in within or INDEX in within:
            found.append(folder)
    if found:
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise Refuse(
            "no-weights",
            f"{place}: no weights at its top, but in {', '.join(map(shown, found[:_LISTED]))}{more}: "
            "fold such a folder by itself, or publish its files at the top",
        )


def _lacking(place: Place, names: Collection[str]) -> Refuse:
    """The refusal of an adapter's directory without its weights."""
    if "adapter_model.bin" in names:
        return Refuse(
            "pickle",
            f"{place}: only adapter_model.bin, a pickle that can run code when loaded; convert it to safetensors (load "
            "it with PEFT and call save_pretrained)",
        )
    if _ADAPTER_HUB in names:
        return Refuse(
            "adapter-kind",
            f"{place}: {_ADAPTER_HUB} is an adapter of AdapterHub, and a pickle; merge it there (merge_adapter) and "
            "publish the whole model",
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    there = f": if {shown(others[0])} is meant, call it so" if others else "; publish it again"
    return Refuse("no-weights", f"{place}: has {CONFIG}, and no {WEIGHTS} beside it{there}")
