"""What an adapter of any kind makes of one tensor of the base: the protocol that every kind of adapter fills, and what
the kinds share. Here no tensor is read: a piece is given the tensors of the adapter's file that it asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from continual.errors import Refuse
from continual.lazily import torch
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.checkpoints.header import TensorInfo

SMALL_RANK = 1024
"""A rank that is let in whatever the shape. A higher one has to be possible: the factors of a file with holes can claim
to be larger than memory."""
Module = Mapping[str, TensorInfo]
"""What the file has for one module of the model: what a tensor is there for, such as `lora_A.weight`, to the tensor."""


class Piece(Protocol):
    """What an adapter adds to one tensor of the base.

    `names`: the tensors of the adapter's file that it is made from, in the order in which they are read and hashed.
    `optional`: it means nothing where the base lacks the tensor. `needs_base`: it depends on the values it is added to.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def optional(self) -> bool: ...
    @property
    def needs_base(self) -> bool: ...

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """The shape of what is added to the tensor `name` of this `shape`, which may have another number of rows where
        that is a vocabulary. `transposed`: the tensor is stored as in × out. Raises Refuse (`shape`) where no number of
        rows makes it fit."""
        ...

    def settings(self, *, transposed: bool) -> str:
        """What besides the tensors' values decides over the task vector; it goes into the digest."""
        ...

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Bytes that `add` takes for what it adds to a tensor of this shape, besides what it is given."""
        ...

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """Writes what is added into `out`, float32 of the shape that `fit` says. `read`: the tensors `names` as the
        file has them. `base`: float32, what it is added to, where that is needed."""
        ...


class Kind(Protocol):
    """A kind of adapter: which keys of a configuration it understands, and which tensors a module has."""

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the configuration that mean something here, or that only say how the tensors came to be."""
        ...

    @property
    def roles(self) -> tuple[str, ...]:
        """What stands behind a module's name in the names of the adapter's tensors."""
        ...

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """The pieces by the names of the weights they are added to. Raises Refuse (`adapter-kind`, `config`, `shape`)
        for settings and tensors that make no whole piece."""
        ...


def roles_of(fields: Fields, module: str, found: Module, *sets: Iterable[str]) -> tuple[TensorInfo, ...]:
    """The tensors of a module, which are exactly those of one of the `sets`, in its order. Raises Refuse
    (`adapter-kind`)."""
    for roles in sets:
        wanted = tuple(roles)
        if found.keys() == set(wanted):
            return tuple(found[role] for role in wanted)
    listed = ", ".join(sorted(info.name for info in found.values()))
    raise Refuse(
        "adapter-kind",
        f"{fields.place}: {module} has only {listed}, no whole set of factors: "
        f"it takes {' or '.join(' and '.join(roles) for roles in sets)}",
    )


def possible(where: str, name: str, rank: int, shape: tuple[int, ...]) -> None:
    """Raises Refuse (`shape`) for a rank that a weight of this shape cannot have, nor anybody needs."""
    if rank > max(min(shape[0], math.prod(shape[1:])), SMALL_RANK):
        raise Refuse(
            "shape",
            f"{where}: the factors of {name} have rank {rank}, more than its shape {list(shape)} can: "
            "merge the adapter into its base and publish that",
        )


def unfit(where: str, name: str, shape: Sequence[int], what: str) -> Refuse:
    """The refusal of tensors that do not fit a weight; `what` says what they are."""
    return Refuse("shape", f"{where}: {what}, {name} is {list(shape)}")
