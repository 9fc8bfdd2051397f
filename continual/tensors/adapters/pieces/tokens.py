"""Rows of a vocabulary's table that were trained on their own: PEFT's kind TRAINABLE_TOKENS, and the key
`trainable_token_indices` of LoRA. The tensor holds the rows as they are after training, not what was added to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from continual.errors import Refuse
from continual.lazily import torch
from continual.outside import shown
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.pieces.contract import Module, Piece, roles_of, unfit
from continual.tensors.checkpoints.header import TensorInfo

TOKENS = "trainable_token_indices"
_LARGEST = 1 << 31


@dataclass(frozen=True, slots=True)
class Tokens:
    """The rows `rows` of a table, after training."""

    where: str
    info: TensorInfo
    rows: tuple[int, ...]
    optional = False
    needs_base = True

    @classmethod
    def of(cls, fields: Fields, weight: str, info: TensorInfo, rows: tuple[int, ...]) -> Tokens:
        """Raises Refuse (`shape`) where the tensor has another number of rows than the configuration names."""
        if len(info.shape) != 2 or info.shape[0] != len(rows):
            raise Refuse(
                "shape",
                f"{fields.place}: {info.name} is {list(info.shape)}, "
                f"and the configuration names {len(rows)} rows of {weight}",
            )
        return cls(str(fields.place), info, rows)

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says. A row that the table lacks asks for a longer one."""
        if len(shape) != 2 or self.info.shape[1] != shape[1]:
            raise unfit(self.where, name, shape, f"{self.info.name} is {list(self.info.shape)}")
        return max(shape[0], *(row + 1 for row in self.rows)), shape[1]

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"tokens {blake3(repr(self.rows).encode()).hexdigest()}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 8 * math.prod(self.info.shape) + 8 * len(self.rows)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says. Rows beyond the table that there is stay out."""
        assert base is not None
        rows = torch.tensor(self.rows)
        there = rows < base.shape[0]
        out.zero_()
        out[rows[there]] = read[0].float()[there] - base[rows[there]]


class TrainableTokens:
    """PEFT's kind of that name."""

    keys = frozenset(["token_indices", "init_weights"])
    roles = ("trainable_tokens_delta", "token_adapter.trainable_tokens_delta")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        rows = indices_of(fields, "token_indices", list(modules))
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            weight = f"{name}.weight"
            (info,) = roles_of(fields, weight, found, self.roles[:1], self.roles[1:])
            pieces[weight] = Tokens.of(fields, weight, info, rows[name])
        return pieces


def indices_of(fields: Fields, key: str, modules: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The rows that the configuration's `key` names of each module: one list for all, or a table of lists by the ends
    of modules' names. Raises Refuse (`config`) for what is no list of rows, and for a module that no entry or several
    are about; (`adapter-kind`) where rows are named and the file has none."""
    body = fields.body.get(key)
    table = body if isinstance(body, dict) else {"": body} if body else {}
    lists = {name: _rows(fields, key, rows) for name, rows in table.items()}
    if lists and not modules:
        raise Refuse("adapter-kind", f"{fields.place}: {key} names rows, and the file has none of them")
    found = {}
    for module in modules:
        fitting = {rows for name, rows in lists.items() if module.endswith(name)}
        if len(fitting) != 1:
            raise Refuse(
                "config", f"{fields.where}: {key} has {len(fitting) or 'no'} lists of rows for {shown(module)}, not one"
            )
        (found[module],) = fitting
    return found


def _rows(fields: Fields, key: str, body: object) -> tuple[int, ...]:
    if (
        not isinstance(body, list)
        or not body
        or not all(type(row) is int and 0 <= row < _LARGEST for row in body)
        or len(set(body)) != len(body)
    ):
        raise Refuse("config", f"{fields.where}: {key} = {shown(body)} is no list of different rows")
    return tuple(body)
