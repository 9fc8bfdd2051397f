"""A candidate in the layout of its base: where the two lay the same weights out in different tensors.

Which layouts there are is said by repacking.py for the experts of full models, by stacked.py for those of adapters,
by fused.py for dense layers, and by turning.py for experts that lie the other way round.
"""

from __future__ import annotations

from continual.tensors.adapters.adapter import Adapter
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.layouts.fused import dense_in_layout_of, pieces_in_layout_of
from continual.tensors.layouts.repacking import Repacked, repacked
from continual.tensors.layouts.stacked import settled
from continual.tensors.layouts.turning import turned_in_layout_of
from continual.tensors.names.kinds import BaseModel

Said = tuple[tuple[str, str], ...]


def in_layout_of(base: BaseModel, model: Checkpoint | Adapter) -> Checkpoint | Adapter:
    """The candidate, its experts packed or one by one and its dense layers fused or apart as they are in the base, an
    adapter with its pieces for the base; a model in the layout of the base is returned as it is. It shares the files of
    `model`.

    Raises Refuse: `missing` naming a part that is not there, `dtype` or `shape` where parts do not fit together,
    `prefix` where a weight is there in both layouts; of an adapter as `settled`.
    """
    return _adapter(base, model)[0] if isinstance(model, Adapter) else _checkpoint(base, model)[0]


def checkpoint_in_layout_of(base: BaseModel, model: Checkpoint) -> Checkpoint:
    """The same of a checkpoint."""
    return _checkpoint(base, model)[0]


def repackings(base: BaseModel, model: Checkpoint | Adapter) -> Said:
    """What of the base's tensors lies otherwise in the candidate, as (base's, candidate's), `*` for the number of an
    expert."""
    return _adapter(base, model)[1] if isinstance(model, Adapter) else _checkpoint(base, model)[1]


def _adapter(base: BaseModel, model: Adapter) -> tuple[Adapter, Said]:
    stacks = settled(base, model.of(base))
    dense, said = pieces_in_layout_of(base, stacks.adapter)
    return dense, (*stacks.said, *said)


def _checkpoint(base: BaseModel, model: Checkpoint) -> tuple[Checkpoint, Said]:
    if isinstance(model, Repacked):
        return model, ()
    stacks, packed = repacked(base, model)
    dense, said = dense_in_layout_of(base, stacks)
    found, turned = turned_in_layout_of(base, dense)
    return found, (*packed, *said, *turned)
