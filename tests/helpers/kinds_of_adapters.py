"""Adapters of every kind, as small as they can be: a configuration of each, and the tensors that go with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from continual.tensors.checkpoints.header import TensorInfo

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
    {"peft_type": "LN_TUNING"},
    {
        "peft_type": "OFT",
        "oft_block_size": 3,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "coft": True,
        "eps": 0.01,
        "peft_version": "0.21.0",
    },
    {"peft_type": "BOFT", "boft_block_size": 3, "boft_n_butterfly_factor": 1, "bias": "boft_only"},
    {"peft_type": "HRA", "r": 2, "apply_GS": True},
    {"peft_type": "SHIRA", "r": 1, "mask_type": "random", "random_seed": 3},
    {"peft_type": "MISS", "r": 4, "mini_r": 2, "init_weights": "mini"},
    {"peft_type": "BONE", "r": 2, "init_weights": "bat"},
    {
        "peft_type": "FOURIERFT",
        "n_frequency": 7,
        "n_frequency_pattern": {"a": 5},
        "random_loc_seed": 777,
        "scaling": 150.0,
    },
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
    "LN_TUNING": {"a": {"ln_tuning_layers.weight": (4, 6)}},
    "OFT": {"a": {"oft_R.weight": (2, 3)}},
    "BOFT": {"a": {"boft_R": (1, 2, 3, 3), "boft_s": (4, 1)}},
    "HRA": {"a": {"hra_u": (6, 2)}},
    "SHIRA": {"a": {"shira_weight": (5,), "shira_indices": (2, 5)}},
    "MISS": {"a": {"miss_block": (4, 2)}},
    "BONE": {"a": {"bone_block": (2, 2, 2)}},
    "FOURIERFT": {"a": {"fourierft_spectrum": (5,)}},
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
