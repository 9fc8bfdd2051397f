"""Adapters of every kind, as small as they can be: a configuration of each, and the tensors that go with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from continual.tensors.header import TensorInfo

Shapes = Mapping[str, tuple[int, ...]]
SEEDS: tuple[dict[str, object], ...] = (
    {
        "peft_type": "ADALORA",
        "init_r": 2,
        "lora_alpha": 4,
        "total_step": 9,
        "rank_pattern": {"a.lora_E": [True, False]},
    },
    {"peft_type": "LOHA", "r": 2, "alpha": 4, "rank_pattern": {"a": 2}, "init_weights": True},
    {"peft_type": "LOKR", "r": 2, "alpha": 4, "alpha_pattern": {"a": 1.5}, "decompose_both": True},
    {"peft_type": "IA3", "feedforward_modules": ["a"], "fan_in_fan_out": False},
    {"peft_type": "VERA", "r": 2, "bias": "vera_only", "save_projection": True},
    {"peft_type": "TRAINABLE_TOKENS", "token_indices": [0, 3], "target_modules": ["a"]},
)
"""The weight `a.weight` has 4 rows and 6 columns."""
ROLES: Mapping[str, Mapping[str, Shapes]] = {
    "LORA": {"a": {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}},
    "ADALORA": {"a": {"lora_A": (1, 6), "lora_B": (4, 1), "lora_E": (1, 1)}},
    "LOHA": {"a": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}},
    "LOKR": {"a": {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 3)}},
    "IA3": {"a": {"ia3_l": (1, 6)}},
    "VERA": {
        "a": {"vera_lambda_b": (4,), "vera_lambda_d": (2,)},
        "base_model": {"vera_A": (2, 6), "vera_B": (4, 2)},
    },
    "TRAINABLE_TOKENS": {"a": {"trainable_tokens_delta": (2, 6)}},
}
"""By `peft_type` and module: the tensors and their shapes."""
MODULES = {
    kind: {
        module: {role: TensorInfo(f"{module}.{role}", "F32", shape, 0, 0, 0) for role, shape in shapes.items()}
        for module, shapes in modules.items()
    }
    for kind, modules in ROLES.items()
}


def seed_of(kind: str) -> dict[str, object]:
    """The configuration of a kind."""
    return next(seed for seed in SEEDS if seed["peft_type"] == kind)


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a kind, by the names that PEFT gives them."""
    return {
        f"base_model.{'' if module == 'base_model' else f'model.{module}.'}{role}": torch.randn(shape)
        for module, shapes in ROLES[kind].items()
        for role, shape in shapes.items()
    }
