"""Each kind of adapter that PEFT can put on a model of a family: its configuration, made as if it had been trained,
written, and applied again by PEFT. Knows nothing of continual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers.pytorch_utils import Conv1D

from tests.campaigns.families.family import Family
from tests.campaigns.families.making import loaded

RANK = 4
_SIZE = 0.02


class Unfit(Exception):
    """The family has nothing that this kind of adapter is about."""


Config = Callable[[Family, Any], Any]
"""Of a family and its model, the configuration."""


def targets(family: Family) -> Any:
    """The modules to adapt, as PEFT takes them."""
    return list(family.targets) if isinstance(family.targets, tuple) else family.targets


def _need(word: str, what: str) -> str:
    if not word:
        raise Unfit(f"the family has no {what}")
    return word


def _lora(**more: Any) -> Config:
    return lambda family, _model: peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=targets(family), **more)


def _table(family: Family, _model: Any) -> Any:
    return peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=[_need(family.table, "input embedding")])


def _head(family: Family, _model: Any) -> Any:
    return peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=targets(family), modules_to_save=[_need(family.head, "head")]
    )


def _table_tied(family: Family, model: Any) -> Any:
    if not model_ties(model):
        raise Unfit("the family's tables are not tied")
    return peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=[family.table], ensure_weight_tying=True)


def model_ties(model: Any) -> bool:
    """Whether the input embedding and the output head are one table."""
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    return None not in ends and ends[0].weight is ends[1].weight


def _tokens_beside(family: Family, _model: Any) -> Any:
    table = _need(family.table, "input embedding")
    return peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=targets(family), trainable_token_indices={table: [3, 5]}
    )


def _tokens(family: Family, _model: Any) -> Any:
    table = _need(family.table, "input embedding")
    return peft.TrainableTokensConfig(target_modules=[table], token_indices=[3, 5])


def _experts(family: Family, _model: Any) -> Any:
    if not family.experts:
        raise Unfit("the family has no packed experts")
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=list(family.experts))


def _loha(family: Family, _model: Any) -> Any:
    return peft.LoHaConfig(r=RANK, alpha=8, target_modules=targets(family))


def _lokr(family: Family, _model: Any) -> Any:
    return peft.LoKrConfig(r=RANK, alpha=8, target_modules=targets(family))


def _without_experts(family: Family, _model: Any) -> Any:
    if not family.experts:
        raise Unfit("the family has no packed experts")
    names = ["q_proj", "k_proj", "v_proj", "q_a_proj", "kv_b_proj", "o_proj"]
    return peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=names)


def _ia3(family: Family, model: Any) -> Any:
    """IA3 scales what enters a layer fed by an activation, and what leaves the others: it wants both by name."""
    names = targets(family)
    if names == "all-linear":
        kinds = (torch.nn.Linear, Conv1D)
        found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        ends = {".".join(name.split(".")[-2:]) for name in found}
        names = sorted(name for name in ends if not (family.head and name.endswith(family.head)))
    down = [name for name in names if isinstance(names, list) and name.endswith(family.down or ("?",))]
    return peft.IA3Config(target_modules=names, feedforward_modules=down)


def _vera(family: Family, _model: Any) -> Any:
    return peft.VeraConfig(r=RANK, target_modules=targets(family), projection_prng_key=5)


def _adalora(family: Family, _model: Any) -> Any:
    return peft.AdaLoraConfig(init_r=RANK, target_r=RANK, lora_alpha=8, target_modules=targets(family), total_step=10)


KINDS: dict[str, Config] = {
    "LoRA": _lora(),
    "LoRA, embedding": _table,
    "LoRA, tied tables": _table_tied,
    "LoRA, head saved": _head,
    "LoRA, biases": _lora(bias="all"),
    "LoRA, tokens": _tokens_beside,
    "LoRA, experts": _experts,
    "LoRA, no experts": _without_experts,
    "rsLoRA": _lora(use_rslora=True),
    "DoRA": _lora(use_dora=True),
    "AdaLoRA": _adalora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "IA3": _ia3,
    "VeRA": _vera,
    "tokens": _tokens,
}


def write(family: Family, base: Path, directory: Path, kind: Config) -> None:
    """Writes an adapter of the model in `base`. Raises Unfit, and what PEFT raises."""
    model = loaded(family, base)
    config = kind(family, model)
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * _SIZE)
    wrapped.save_pretrained(directory)


def applied(family: Family, base: Path, directory: Path) -> Any:
    """The adapter on its base, as PEFT loads it. Raises what PEFT raises."""
    return peft.PeftModel.from_pretrained(loaded(family, base), directory).eval()
