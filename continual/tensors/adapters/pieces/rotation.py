"""Adapters that turn the inputs of a layer: OFT by blocks of Cayley's form, BOFT by the same and a scale of each
output, HRA by reflections. What they add to a weight W is W·R − W, from the right; so they depend on the base.

Qiu et al. 2023, "OFT", section 4.2; Liu et al. 2024, "BOFT", section 4; Yuan et al. 2024, "HRA", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.lazily import torch
from continual.outside import shown
from continual.tensors.adapters.adapter_config import MERGE, Fields
from continual.tensors.adapters.pieces.contract import Module, Piece, possible, roles_of, unfit
from continual.tensors.checkpoints.header import TensorInfo

_MOST_TERMS = 64
"""Terms of Neumann's series. PEFT's default are 5."""


@dataclass(frozen=True, slots=True)
class _Cayley:
    """How blocks are made orthogonal. `terms`: so many of Neumann's series (0: solved exactly). `least`: the length to
    which a block is cut, over the root of their number (0: none is cut)."""

    terms: int = 0
    least: float = 0.0

    def of(self, skew: torch.Tensor) -> torch.Tensor:
        """(1 − S)(1 + S)⁻¹ of each skew matrix; of the series, that of −S."""
        if self.least:
            lengths = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            most = self.least / math.sqrt(len(skew))
            skew = torch.where(lengths <= most, skew, skew * (most / lengths))
        one = torch.eye(skew.shape[-1]).expand_as(skew)
        if not self.terms:
            solved: torch.Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
            return solved
        found, power = one.clone(), one
        last = max(3, self.terms - 1) if self.terms > 2 else self.terms - 1
        for number in range(1, last + 1):
            power = power @ skew
            found.add_(power, alpha=1.0 if number == last > 2 else 2.0)  # PEFT counts the last term half
        return found


@dataclass(frozen=True, slots=True)
class Turned:
    """W·R − W. `how` says what `rotation` holds: `packed`, what is above the diagonals of the blocks; `blocks`, whose
    skew part counts; `reflected`, a column for each reflection; `orthogonal`, the same made orthogonal to each other.
    `table`: the rows of a table are turned, not what enters a layer. `lengths`: a factor for each output."""

    where: str
    rotation: TensorInfo
    how: Literal["packed", "blocks", "reflected", "orthogonal"]
    cayley: _Cayley = _Cayley()
    table: bool = False
    lengths: TensorInfo | None = None
    optional = False
    needs_base = True

    @property
    def names(self) -> tuple[str, ...]:
        """The rotation, and the lengths."""
        return (self.rotation.name, *((self.lengths.name,) if self.lengths else ()))

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says. PEFT has none of these for layers that store in × out."""
        inputs, turned = math.prod(shape[1:]), self.rotation.shape
        if self.how == "packed":
            size = _size(turned[1])
            fits = inputs % size == 0 and turned[0] in (1, inputs // size)
        elif self.how == "blocks":
            fits = turned[-3] * turned[-1] == inputs
        else:
            fits = turned[0] == inputs
            possible(self.where, name, turned[1], (inputs, inputs))
        scaled = self.lengths is None or math.prod(self.lengths.shape) == shape[0]
        if transposed or len(shape) < 2 or not fits or not scaled:
            stored = ", which is stored transposed" if transposed else ""
            raise unfit(self.where, name, shape, f"{self.rotation.name} is {list(turned)}{stored}")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"turned {self.how} {self.cayley.terms} {self.cayley.least!r} {self.table}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        if self.how in ("reflected", "orthogonal"):
            return 8 * math.prod(self.rotation.shape) + 12 * math.prod(shape)
        return 4 * (8 * math.prod(shape[1:]) * self._block() + 3 * math.prod(shape))

    def _block(self) -> int:
        """Rows of a block."""
        return _size(self.rotation.shape[1]) if self.how == "packed" else self.rotation.shape[-1]

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        assert base is not None
        flat, turned = base.view(base.shape[0], -1), out.view(out.shape[0], -1)
        if self.how in ("reflected", "orthogonal"):
            _reflect(flat, read[0].float(), turned, orthogonal=self.how == "orthogonal")
        else:
            blocks = self.cayley.of(self._skew(read[0].float()))
            size, count = blocks.shape[-1], flat.shape[1] // blocks.shape[-1]
            blocks = blocks.expand(count, size, size)
            # x·R before the layer is W·Rᵀ; a table's rows are what is turned
            blocks = blocks if self.table else blocks.mT
            parts = flat.view(-1, count, size).transpose(0, 1)
            turned.view(-1, count, size).copy_(torch.bmm(parts, blocks).transpose(0, 1))
        if self.lengths is not None:
            turned.mul_(read[1].float().reshape(-1, 1))
        turned.sub_(flat)

    def _skew(self, values: torch.Tensor) -> torch.Tensor:
        if self.how == "blocks":
            blocks = values.reshape(-1, *values.shape[-2:])
            return (blocks - blocks.mT) / 2
        size = _size(values.shape[1])
        rows, columns = torch.triu_indices(size, size, 1)
        skew = torch.zeros(len(values), size, size)
        skew[:, rows, columns] = values
        return skew - skew.mT


def _reflect(flat: torch.Tensor, columns: torch.Tensor, turned: torch.Tensor, *, orthogonal: bool) -> None:
    """The rows of `flat` after one reflection after the other, into `turned`."""
    turned.copy_(flat)
    done: list[torch.Tensor] = []
    for number in range(columns.shape[1]):
        normal = columns[:, number]
        for other in done:
            normal = normal - other.dot(normal) * other
        normal = normal / torch.linalg.vector_norm(normal)
        if orthogonal:
            done.append(normal)
        turned.sub_(2 * torch.outer(turned @ normal, normal))


def _size(elements: int) -> int:
    """The rows of a square matrix that has so many elements above its diagonal; 0 where none has."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


class Oft:
    """OFT as PEFT saves it since 0.14, with `coft`, `block_share` and Neumann's series."""

    keys = frozenset(
        [
            "r",
            "oft_block_size",
            "module_dropout",
            "fan_in_fan_out",
            "bias",
            "init_weights",
            "coft",
            "eps",
            "block_share",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
        ]
    )
    roles = ("oft_R.weight", "oft_embedding_R.weight")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        series = fields.flag("use_cayley_neumann")
        older = "0.14" if "oft_block_size" not in fields.body else "0.18"
        if older == "0.14" or (series and not fields.body.get("peft_version")):
            raise Refuse(
                "adapter-kind",
                f"{fields.place}: OFT as PEFT before {older} had it, which it reads otherwise today; merge it with the "
                "PEFT that it was trained with, and publish that",
            )
        terms = fields.rank("num_cayley_neumann_terms", 5) if series else 0
        if terms > _MOST_TERMS:
            raise Refuse("config", f"{fields.where}: num_cayley_neumann_terms = {terms} is more than {_MOST_TERMS}")
        cayley = _Cayley(terms, fields.number("eps", 6e-5) if fields.flag("coft") else 0.0)
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            (info,) = roles_of(fields, f"{name}.weight", found, self.roles[:1], self.roles[1:])
            table = info is found.get(self.roles[1])
            _check_form(fields, info, len(info.shape) == 2 and _size(info.shape[1]) > 0)
            pieces[f"{name}.weight"] = Turned(str(fields.place), info, "packed", cayley, table)
        return pieces


class Boft:
    """BOFT as PEFT saves it, with one butterfly factor: on a machine without a compiler for CUDA it knows no other."""

    keys = frozenset(
        [
            "boft_block_size",
            "boft_block_num",
            "boft_n_butterfly_factor",
            "boft_dropout",
            "fan_in_fan_out",
            "bias",
            "init_weights",
        ]
    )
    roles = ("boft_R", "boft_s")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            info, lengths = roles_of(fields, f"{name}.weight", found, self.roles)
            _check_form(fields, info, len(info.shape) == 4 and info.shape[2] == info.shape[3] > 0)
            factors = info.shape[0]
            _check_form(fields, info, factors in (1, fields.body.get("boft_n_butterfly_factor")))
            if factors != 1:
                raise Refuse(
                    "adapter-kind",
                    f"{fields.place}: {info.name} has {factors} butterfly factors, and only one is understood; {MERGE}",
                )
            pieces[f"{name}.weight"] = Turned(str(fields.place), info, "blocks", lengths=lengths)
        return pieces


class Hra:
    """HRA as PEFT saves it."""

    keys = frozenset(["r", "apply_GS", "init_weights", "bias"])
    roles = ("hra_u",)

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        rank, orthogonal = fields.rank("r", 8), fields.flag("apply_GS")
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            (info,) = roles_of(fields, f"{name}.weight", found, self.roles)
            _check_form(fields, info, len(info.shape) == 2 and info.shape[1] == rank)
            how: Literal["orthogonal", "reflected"] = "orthogonal" if orthogonal else "reflected"
            pieces[f"{name}.weight"] = Turned(str(fields.place), info, how)
        return pieces


def _check_form(fields: Fields, info: TensorInfo, fits: bool) -> None:
    """Raises Refuse (`shape`) for a tensor that is no rotation of this configuration."""
    if not fits or 0 in info.shape:
        raise Refuse(
            "shape", f"{fields.place}: {info.name} is {list(info.shape)}, no rotation of a {shown(fields.kind)} adapter"
        )
