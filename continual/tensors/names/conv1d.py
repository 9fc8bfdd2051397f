"""Which families of models keep dense layers as Conv1D, whose weights lie in × out."""

from __future__ import annotations

CONV1D = {
    family: frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
    for family in ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer")
}
"""Modules that store their weight as in × out (transformers' Conv1D), by model type. An adapter's one flag is that of
the layer PEFT met last."""
