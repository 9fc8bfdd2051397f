"""What is left over when a candidate's names have been matched with the base's: weights that the base lacks on one
side, weights that the candidate lacks on the other; and whether they are the same weights after all.

What becomes of that is for gates/lineage.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from continual.tensors.kinds import is_vocabulary
from continual.tensors.renaming import canonical

_HEADS = frozenset(
    (
        "classifier",
        "cls",
        "discriminator_predictions",
        "embed_out",
        "generator_lm_head",
        "generator_predictions",
        "head",
        "heads",
        "lm_head",
        "logits_proj",
        "pooler",
        "pre_classifier",
        "predictions",
        "projection_head",
        "projector",
        "qa_outputs",
        "score",
        "seq_relationship",
        "summary",
        "text_projection",
        "v_head",
        "value_head",
        "visual_projection",
        "vocab_layer_norm",
        "vocab_projector",
        "vocab_transform",
    )
)
"""Parts of names that are heads of a task, or what pools for one. A fine-tune for another task leaves out the base's,
and brings its own, perhaps of the same shape: these are two weights."""
_OUTPUTS = frozenset(
    [
        "embed_out",
        "lm_head",
        "generator_lm_head",
        "vocab_projector",
        "pred_layer",
        "output_projection",
        "output_layer",
        "predictions",
    ]
)
"""Parts of names of tables that stand at a language model's end."""
_PARTS = ("lora_", "base_layer", "hada_w", "lokr_w", "ia3_l", "vera_lambda", "boft_", "oft_r", "modules_to_save")
"""How parts of a name begin that only an adapter has."""


class Left(NamedTuple):
    """A tensor that is left over on one side."""

    name: str
    shape: tuple[int, ...]


def same_after_all(missing: Iterable[Left], extra: Iterable[Left], family: str) -> tuple[Left, Left] | None:
    """The first pair of a tensor that the candidate lacks and one that the base lacks which may be the same weights
    under another name or in another layout; None where there is none.

    They may where both lie in one layer, or have one shape, unless the candidate's is a head of its own.
    """
    layers: dict[str, Left] = {}
    shapes: dict[tuple[int, ...], Left] = {}
    words: dict[tuple[int, ...], Left] = {}
    for left in missing:
        layers.setdefault(_layer(canonical(left.name, family)), left)
        shapes.setdefault(left.shape, left)
        if is_vocabulary(left.name):
            words.setdefault(left.shape, left)
    layers.pop("", None)
    for left in extra:
        name = canonical(left.name, family)
        layer = _layer(name)
        head = not layer and not _HEADS.isdisjoint(name.split("."))
        found = layers.get(layer) or (words if head and is_vocabulary(left.name) else {} if head else shapes).get(
            left.shape
        )
        if found is not None:
            return found, left
    return None


def of_an_adapter(names: Iterable[str]) -> str | None:
    """The first of these names that only an adapter has which was not merged."""
    return next((name for name in names if any(part.startswith(_PARTS) for part in name.split("."))), None)


def in_layer(name: str, family: str) -> bool:
    """Whether a name is that of a weight in a numbered layer."""
    return bool(_layer(canonical(name, family)))


def is_head(name: str) -> bool:
    """Whether a name is that of a head of a task, which a base may lack."""
    return not _HEADS.isdisjoint(name.split("."))


def is_output(name: str) -> bool:
    """Whether a table of words is a language model's head, not an input embedding."""
    return not _OUTPUTS.isdisjoint(name.split(".")) or name in ("output.weight", "proj_out.weight")


def _layer(name: str) -> str:
    """What stands before the layer's number, and the number; empty for a tensor that lies in no layer."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])
