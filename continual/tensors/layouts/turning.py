"""Packed experts that lie as out × in in one of base and candidate, and as in × out in the other.

Qwen3-VL-MoE was published as in × out. transformers 5 turns its experts when it loads them, and saves them as they are
in memory: as out × in. So a fine-tune has the other layout than its base. A candidate's experts are turned while they
are read, one at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

from continual.lazily import torch
from continual.tensors.checkpoints.checkpoint import TORCH, Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.layouts.repacking import Repacked, packed_of
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.renaming import canonical, family_of

BOTH = frozenset(("qwen3_vl_moe", "qwen3_vl_moe_text"))
"""`model_type`s whose files are published in both layouts."""


class TurnedStacks(Repacked):
    """A checkpoint some of whose stacks are read with each expert turned: `stacks` has them by name, as they lie in
    the files. It shares the files of `model`."""

    def __init__(self, model: Checkpoint, stacks: Mapping[str, TensorInfo]) -> None:
        turned = {name: info._replace(shape=(info.shape[0], *info.shape[:0:-1])) for name, info in stacks.items()}
        super().__init__(model, {**model.tensors, **turned}, {})
        self._stacks = dict(stacks)
        self._last = threading.local()

    def read_part(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """As `Checkpoint.read_part`."""
        if info.name not in self._stacks:
            super().read_part(info, start, into)
            return
        each, done = info.nbytes // info.shape[0], 0
        while done < len(into):
            number, within = divmod(start + done, each)
            part = self._expert(info.name, number)[within : within + len(into) - done]
            into[done : done + len(part)] = part
            done += len(part)

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `Checkpoint.read`."""
        if name not in self._stacks:
            return super().read(name, out)
        info = self.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8) if out is None else out[: info.nbytes]
        self.read_part(info, 0, raw.numpy().data)
        return raw.view(TORCH[info.dtype]).reshape(info.shape)

    def _expert(self, name: str, number: int) -> memoryview:
        """The bytes of one expert, turned; each thread keeps its last one."""
        if getattr(self._last, "which", None) != (name, number):
            info = self._stacks[name]
            each = info.nbytes // info.shape[0]
            raw = torch.empty(each, dtype=torch.uint8)
            super().read_part(info, number * each, raw.numpy().data)
            turned = raw.view(TORCH[info.dtype]).view(info.shape[1:]).T.contiguous()
            self._last.which, self._last.bytes = (name, number), turned.view(-1).view(torch.uint8).numpy().data
        found: memoryview = self._last.bytes
        return found


def turned_in_layout_of(base: BaseModel, model: Checkpoint) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
    """The candidate, its packed experts the way round that they have in the base, and what is turned. A model whose
    shapes do not say that all of them are turned is returned as it is."""
    config = base.checkpoint.config
    inner = config.get("text_config")
    family = family_of(config)
    if BOTH.isdisjoint((family, family_of(inner) if isinstance(inner, dict) else "")):
        return model, ()
    ours = {
        canonical(name, family): info for name, info in base.checkpoint.tensors.items() if packed_of(info) is not None
    }
    stacks: dict[str, TensorInfo] = {}
    sure = False
    for name, info in model.tensors.items():
        our = ours.get(canonical(name, family)) if packed_of(info) is not None else None
        if our is None or not math.prod(info.shape):
            continue
        if info.shape != (our.shape[0], *our.shape[:0:-1]):
            return model, ()
        sure = sure or info.shape != our.shape
        stacks[name] = info
    if not sure:
        return model, ()
    said = {(f"experts.{role}", f"experts.{role}, turned") for role in (name.rpartition(".")[2] for name in stacks)}
    return TurnedStacks(model, stacks), tuple(sorted(said))
