"""Whether an adapter changes one of two tables that are one in the base: the embedding of words and the output head."""

from __future__ import annotations

from continual.errors import Refuse
from continual.records import TensorSpec
from continual.tensors import Adapter, BaseModel
from continual.tensors.bases.kept import or_untied
from continual.tensors.matched.matching import Match
from continual.tensors.names.tied import other_table

_BARE = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""`task_type`s of adapters whose model has no output head that could be tied."""


def check_tied(base: BaseModel, model: Adapter, spec: TensorSpec, source: Match) -> None:
    """Raises Refuse (`tied`) where an adapter changes one of two tables that are one in the base: in use it leaves the
    other as it was, and merged it changes both."""
    other = other_table(base.checkpoint, base.aliases, spec.name)
    if spec.name in base.untied.values() or other is None or model.tying or model.config.body.get("task_type") in _BARE:
        return
    whole = source.full is not None and (_is_of_both(model, source) or not model.is_trained(source.full.name))
    if source.piece is None and whole:
        return  # PEFT stores the whole table where the vocabulary was resized, and loads it into both
    changed = source.piece.names[0] if source.piece else source.full.name if source.full else spec.name
    if "trainable_tokens" in changed:
        return  # PEFT gives both tables the same rows, in use as well
    raise Refuse(
        "tied",
        f"{model.place}: {changed} changes one of {spec.name} and {other}, which are one table in the base: in use the "
        "other stays as it was, and merged both change. Train it with ensure_weight_tying = true; or set tied = both "
        f"to have both changed{or_untied(base)}",
        by=("tied",),
    )


def _is_of_both(model: Adapter, source: Match) -> bool:
    """Whether an adapter brings a whole table under the names of both, and not twice under one."""
    names = {twin.name for twin in (source.full, *source.twins) if twin is not None}
    return not any(names <= {*saved} for saved in model.saved.values())
