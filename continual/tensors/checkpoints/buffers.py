"""Which tensors of a model are buffers: values that a class computes from its configuration and writes beside the
weights, in some versions and not in others. Nothing is lost where a fine-tune has none, and nothing is said where it
has more.

Statistics that training moves, as those of batch norm, are no buffers in this sense, and neither is the correction of a
router (`e_score_correction_bias`).
"""

from __future__ import annotations

from collections.abc import Sequence

_ALWAYS = frozenset(
    (
        "inv_freq",
        "original_inv_freq",
        "freqs_cis",
        "cos_cached",
        "sin_cached",
        "masked_bias",
        "position_ids",
        "token_type_ids",
        "num_batches_tracked",
        "relative_position_index",
        "relative_coords_table",
        "causal_mask",
        "attn_mask",
        "final_logits_bias",
    )
)
"""Last parts of names that are buffers in every family."""
_MASKS = frozenset(("bias", "mask"))
"""Last parts of names that are causal masks where they are 1 × 1 × length × length: GPT-2, GPT-NeoX, GPT-J, CodeGen."""


_SINES = frozenset(("marian", "pegasus"))
"""`model_type`s whose position embeddings are sines; one of their classes does not save them."""


def is_computed(name: str, family: str) -> bool:
    """Whether the tensor of this name is a table that a class of this `model_type` computes, though it stands among its
    weights."""
    return family in _SINES and name.endswith("embed_positions.weight")


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether the tensor of this name and shape is a buffer."""
    last = name.rpartition(".")[2]
    if last in _MASKS:
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return last in _ALWAYS or name.endswith("embed_positions.weights")
