"""A candidate in the layout of its base: where the two lay the same weights out in different tensors.

Which layouts there are is said by repacking.py for full models, and by stacked.py for adapters.
"""

from __future__ import annotations

from continual.tensors.adapter import Adapter
from continual.tensors.checkpoint import Checkpoint
from continual.tensors.kinds import BaseModel
from continual.tensors.repacking import checkpoint_in_layout_of, repacked
from continual.tensors.stacked import settled

__all__ = ["checkpoint_in_layout_of", "in_layout_of", "repackings"]


def in_layout_of(base: BaseModel, model: Checkpoint | Adapter) -> Checkpoint | Adapter:
    """The candidate, its experts packed or one by one as they are in the base, an adapter with its pieces for the base;
    a model in the layout of the base is returned as it is. It shares the files of `model`.

    Raises Refuse: `missing` naming an expert that is not there, `dtype` or `shape` where experts of a layer differ,
    `prefix` where a weight is there in both layouts; of an adapter as `settled`.
    """
    return settled(base, model.of(base)).adapter if isinstance(model, Adapter) else checkpoint_in_layout_of(base, model)


def repackings(base: BaseModel, model: Checkpoint | Adapter) -> tuple[tuple[str, str], ...]:
    """What of the base's tensors lies otherwise in the candidate, as (base's, candidate's), `*` for the number of an
    expert."""
    return settled(base, model.of(base)).said if isinstance(model, Adapter) else repacked(base, model)[1]
