"""The names in a LoRA file: which tensors are about one module of the model, and what each of them is there for.

Trainers call one thing by several names (`lora_down.weight`, `lora.down.weight`, `lora_A.weight`); here each has one
role. A name that has none is refused: nothing of a file is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import shown
from continual.tensors.checkpoints.foreign import is_factor
from continual.tensors.checkpoints.header import TensorInfo

DOWN, UP, MID, ALPHA, DORA, MAGNITUDE, BIAS = "down", "up", "mid", "alpha", "dora", "magnitude", "bias"
TABLE_A, TABLE_B, DIFF, DIFF_BIAS = "table_a", "table_b", "diff", "diff_bias"
_ROLES: Mapping[str, str] = {
    "lora_down.weight": DOWN,
    "lora_up.weight": UP,
    "lora_mid.weight": MID,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN,
    "lora_linear_layer.up.weight": UP,
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A": DOWN,
    "lora_B": UP,
    "lora_B.bias": BIAS,
    "lora_embedding_A": TABLE_A,
    "lora_embedding_B": TABLE_B,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "dora_scale": DORA,
    "alpha": ALPHA,
    "diff": DIFF,
    "w_norm": DIFF,
    "diff_b": DIFF_BIAS,
    "b_norm": DIFF_BIAS,
    **{
        role: role
        for role in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
}
"""What a tensor's name ends in, and its role."""
_END = re.compile(rf"(?P<module>.+?)\.(?P<role>{'|'.join(map(re.escape, sorted(_ROLES, key=len, reverse=True)))})")
_PROCESSOR = re.compile(r"(?P<head>.+)\.(?P<own>to_(?:q|k|v|out))_lora\.(?P<way>down|up)\.weight")
"""As old versions of diffusers named what is in an attention processor: `attn1.processor.to_q_lora.down.weight`."""
_FUSED = re.compile(r"(?P<module>.+\.(?:qkv|proj)_lora\d?)\.(?P<way>down|up)\.weight")
"""As the trainer of XLabs names it, for Flux: `double_blocks.0.processor.qkv_lora1.down.weight`."""
_NAMED = re.compile(r"\.default(?:_\d+)?(?=\.weight$|\.bias$|$)")
_OTHER: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(?:oft_blocks|oft_diag|oft_R\b.*|boft_.*)$"), "OFT"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$"), "(IA)³"),
    (re.compile(r"^bundle_emb\."), "words that were trained beside it (textual inversion)"),
    (re.compile(r"^emb_params$|string_to_param"), "words that were trained beside it (textual inversion)"),
    (re.compile(r"\.(?:ip_adapter|to_k_ip|to_v_ip)\b"), "an IP-Adapter"),
)
"""What a tensor is that is in such files and is no part of a LoRA."""


class Group(NamedTuple):
    """The tensors about one module: its name in the file, and the tensors by their roles."""

    module: str
    roles: Mapping[str, TensorInfo]


def is_lora(names: Collection[str]) -> bool:
    """Whether what a file holds is a LoRA: most of its tensors are factors of one, or their alphas."""
    factors = sum(is_factor(name) for name in names)
    alphas = sum(name.endswith(".alpha") for name in names)
    return factors > 0 and 2 * (factors + alphas) > len(names)


def groups(tensors: Mapping[str, TensorInfo], where: str) -> tuple[Group, ...]:
    """The tensors of a file by the modules that they are about. Raises Refuse (`adapter-kind`) naming a tensor that is
    no part of a LoRA, and two that are the same part of one."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in sorted(tensors.items()):
        module, role = _parsed(name, where)
        roles = found.setdefault(module, {})
        if role in roles:
            raise Refuse("adapter-kind", f"{where}: {name} and {roles[role].name} are the same part of one module")
        roles[role] = info
    return tuple(Group(module, roles) for module, roles in found.items())


def _parsed(name: str, where: str) -> tuple[str, str]:
    plain = _NAMED.sub("", name)
    if match := _PROCESSOR.fullmatch(plain):
        head = match["head"].removesuffix(".processor")
        return f"{head}.{match['own']}", match["way"]
    if match := _FUSED.fullmatch(plain):
        return match["module"], match["way"]
    if match := _END.fullmatch(plain):
        return match["module"], _ROLES[match["role"]]
    what = next((what for pattern, what in _OTHER if pattern.search(name)), None)
    raise Refuse(
        "adapter-kind",
        f"{where}: tensor {shown(name)} is {f'of {what}' if what else 'no part of a LoRA'}, which cannot be folded: "
        "merge the file into its base with the program that it was made for and publish that, or publish the file "
        "without it",
    )
