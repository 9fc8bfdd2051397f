"""Whether everything that an adapter brings is folded: what stays out is only what a base cannot have, and it is
listed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from continual.errors import Refuse
from continual.outside import few
from continual.tensors import Adapter, BaseModel
from continual.tensors.adapters.adapter_files import VALUE_HEADS
from continual.tensors.checkpoints.buffers import is_buffer
from continual.tensors.matched.matching import Match, Naming, carried_of, names_of
from continual.tensors.names.kinds import is_vocabulary
from continual.tensors.names.leftovers import in_layer, is_head, is_output
from continual.tensors.names.renaming import family_of


def check_brought(
    base: BaseModel,
    model: Adapter,
    names: Naming,
    found: Mapping[str, Match],
    known: Collection[str],
    carried: Literal["refuse", "leave-out"],
) -> tuple[str, ...]:
    """The weights that the adapter brings and that stay out: heads that the base lacks, files with a value head among
    them, and with `carried` = leave-out those that this state does not fold.

    Raises Refuse (`adapter-target`) for a weight that is no such thing, and where nothing would be folded.
    """
    where, family = model.place, family_of(base.checkpoint.config)
    unmet = sorted(
        name
        for name, piece in model.pieces.items()
        if not (piece.optional or name in known or _is_of_another_head(name, known, family))
    )
    if unmet and all(name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in known for name in unmet):
        raise Refuse(
            "adapter-target",
            f"{where}: adds a bias to layers that have none in the base, {few(unmet)} (lora_bias): PEFT cannot merge "
            "such an adapter either; train it without lora_bias",
        )
    if unmet:
        raise Refuse(
            "adapter-target",
            f"{where}: adapts {few(unmet)}, which the base does not have: an adapter of another base; fold "
            "it into a state of the base that it was trained on",
        )
    kept = [name for name in carried_of(base, model, names) if not _is_computed(model, name)]
    if kept and carried == "refuse":
        raise Refuse(
            "adapter-target",
            f"{where}: changes {few(kept)}, which this state does not fold (exclude of init, or no floats); "
            "gates.lineage.carried = leave-out folds the rest without it; or make a state that folds it",
            by=("carried",),
        )
    if model.outside and carried == "refuse":
        raise Refuse(
            "adapter-target",
            f"{where}: changes {few(model.outside)}, of a component that the base of this state does not have: make "
            "a state of the whole pipeline; or gates.lineage.carried = leave-out folds the rest without it",
            by=("carried",),
        )
    unknown = sorted(name for name in names_of(model) if name not in known and not _is_computed(model, name))
    for name in unknown:
        _check_is_of_a_head(base, model, name, found)
    if not found:
        raise Refuse(
            "adapter-target",
            f"{where}: adapts nothing that this base folds, only {few(sorted(names_of(model)))}",
        )
    beside = sorted(where.names().intersection(VALUE_HEADS))
    return (*unknown, *kept, *model.outside, *beside)


def _is_of_another_head(name: str, known: Collection[str], family: str) -> bool:
    """Whether a weight is one of a head for a task that the base has nothing of."""
    module = name.rpartition(".")[0]
    return is_head(name, family) and not in_layer(name, family) and f"{module}.weight" not in known


def _check_is_of_a_head(base: BaseModel, model: Adapter, name: str, found: Mapping[str, Match]) -> None:
    """Raises Refuse (`adapter-target`) for a weight that the base lacks in one of its layers, and for a table of words
    that the base seems to have under another name."""
    if in_layer(name, family_of(base.checkpoint.config)):
        raise Refuse(
            "adapter-target",
            f"{model.place}: brings {name}, which the base does not have in that layer: an adapter of another base",
        )
    if not is_vocabulary(name):
        return
    for spec in base.specs:
        if spec.name not in found and is_vocabulary(spec.name) and is_output(spec.name) == is_output(name):
            raise Refuse(
                "adapter-target",
                f"{model.place}: brings {name}, and the base has {spec.name} in that place: name it as the base does",
            )


def _is_computed(model: Adapter, name: str) -> bool:
    """Whether what is saved under this name is a buffer, which a class makes anew."""
    saved = model.saved.get(name, ())
    return bool(saved) and is_buffer(name, model.weights.tensors[saved[0]].shape)
