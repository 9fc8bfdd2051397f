"""Whether a model's config.json has the layers compute the same as the base's do with their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from continual.config.values import Texts
from continual.errors import Refuse
from continual.gates.contract import AtFold, Doubt, Headers
from continual.outside import few, shown
from continual.tensors import Adapter

_KEYS = frozenset(
    (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads"),
        *("hidden_act", "activation_function", "hidden_activation", "activation", "feed_forward_proj"),
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "position_embedding_type"),
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon"),
        *("sliding_window", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"),
        *("num_experts_per_tok", "scale_attn_by_inverse_layer_idx", "query_pre_attn_scalar"),
    )
)
"""What changes the sense of weights of the same shapes. Lengths, dropout, tokens and versions do not."""


@dataclass(frozen=True)
class ConfigGate(AtFold, Doubt):
    """Tells of a full model whose config.json says something else than the base's where both say something: another
    kind of model, number of heads, activation, other frequencies of positions. The merge keeps the base's.

    `act`: `warn` by default: to stretch the frequencies of positions is a common way to train for longer texts.
    `but`: keys that may say something else.
    """

    name = "config"
    reasons = ("other-config",)

    act: Literal["refuse", "warn", "off"] = "warn"
    but: Texts = ()

    def judge(self, seen: Headers) -> None:
        """Raises Refuse (`other-config`)."""
        if self.act == "off" or isinstance(seen.model, Adapter):
            return
        ours, theirs = dict(_said(seen.base.checkpoint.config)), dict(_said(seen.model.config))
        other = sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key] and key not in self.but)
        if other:
            said = few(f"{key} = {shown(theirs[key])} (the base: {shown(ours[key])})" for key in other)
            raise Refuse(
                "other-config",
                f"{seen.model.place.file('config.json')}: computes something else with weights of these shapes: "
                f"{said}; the merge keeps what the base says; to hear nothing of a key, add it to gates.config.but",
                by=("but",),
            )


def _is_compound(config: Mapping[str, object]) -> bool:
    """Whether it is of a model with others in it, whose kind is another one than that of the text model alone."""
    return any(key.endswith("_config") and isinstance(value, Mapping) for key, value in config.items())


def _said(config: Mapping[str, object], before: str = "", depth: int = 2) -> Iterator[tuple[str, object]]:
    """What a configuration and those within it say of this, by their keys."""
    for key, value in config.items():
        if value is not None and (key in _KEYS or (key == "model_type" and not _is_compound(config))):
            yield before + key, value
        elif isinstance(value, Mapping) and depth and key.endswith("_config"):
            yield from _said(value, f"{before}{key}.", depth - 1)
