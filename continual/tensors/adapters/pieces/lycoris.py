"""Adapters whose task vector is a product of other kinds than B·A: Hadamard's (LoHa) and Kronecker's (LoKr).

Hyeon-Woo et al. 2022, "FedPara", proposition 1; Yeh et al. 2024, "LyCORIS", sections 3.2 and 3.3. For convolutions the
thin matrices may be those of a Tucker decomposition, whose core is a tensor of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from continual.errors import Refuse
from continual.lazily import torch
from continual.outside import shown
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.pieces.contract import Module, Piece, possible, roles_of, unfit
from continual.tensors.checkpoints.header import TensorInfo

_KEYS = frozenset(
    [
        "r",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "init_weights",
        "rank_pattern",
        "alpha_pattern",
    ]
)
_HARMLESS_INIT: tuple[object, ...] = (True, False, None, "lycoris")


@dataclass(frozen=True, slots=True)
class _Thin:
    """A matrix (or convolution) as its file has it: whole, as a product of two, or as a Tucker core and two. `shape` is
    that of what it stands for."""

    infos: tuple[TensorInfo, ...]
    shape: tuple[int, ...]
    rank: int

    def of(self, read: Sequence[torch.Tensor]) -> torch.Tensor:
        """What it stands for, in float32; `read` has its tensors."""
        if len(read) == 1:
            return read[0].float()
        if len(read) == 2:
            return read[0].float() @ read[1].float()
        core, rows, columns = (tensor.float() for tensor in read)
        return torch.einsum("ijkl,ip,jr->prkl", core, rows, columns)

    @property
    def columns(self) -> int | None:
        """How many columns two factors of it have; None of what is no product of two matrices."""
        if len(self.infos) > 2 or len(self.shape) != 2:
            return None
        return self.rank if len(self.infos) == 2 else min(self.shape)

    def factors(self, read: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors in float64, m×r and n×r: what it stands for is left·rightᵀ."""
        if len(self.infos) == 2:
            return read[0].double(), read[1].double().mT
        whole = read[0].double()
        one = torch.eye(min(self.shape), dtype=torch.float64)
        return (one, whole.mT) if len(whole) <= whole.shape[1] else (whole, one)


@dataclass(frozen=True, slots=True)
class Pair:
    """scale·(first ∘ second) or scale·(first ⊗ second)."""

    where: str
    first: _Thin
    second: _Thin
    scale: float
    kronecker: bool
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of both."""
        return tuple(info.name for info in (*self.first.infos, *self.second.infos))

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says. No vocabulary has such a piece in PEFT, and no layer that stores in × out."""
        first, second = self.first.shape, self.second.shape
        numel = math.prod(first) * math.prod(second) if self.kronecker else math.prod(first)
        rows = first[0] * second[0] if self.kronecker and len(second) != 3 else numel // max(1, math.prod(shape[1:]))
        alike = self.kronecker or first == second
        if transposed or len(shape) < 2 or not alike or numel != math.prod(shape) or rows != shape[0]:
            what = "Kronecker" if self.kronecker else "Hadamard"
            stored = ", which is stored transposed," if transposed else ""
            raise unfit(
                self.where,
                name,
                shape,
                f"{self.names[0]} and its fellows{stored} are a {what} product of {list(first)} and {list(second)}",
            )
        for thin in (self.first, self.second):
            possible(self.where, name, thin.rank, shape)
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"{'lokr' if self.kronecker else 'loha'} {self.scale!r}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        widest = max(math.prod(info.shape) for info in (*self.first.infos, *self.second.infos))
        return 4 * (math.prod(self.first.shape) + math.prod(self.second.shape) + 2 * math.prod(shape) + 2 * widest)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        first = self.first.of(read[: len(self.first.infos)])
        second = self.second.of(read[len(self.first.infos) :])
        if self.kronecker:
            if second.dim() == 4:
                first = first[:, :, None, None]
            out.copy_(torch.kron(first, second.contiguous()).reshape(out.shape))
        else:
            torch.mul(first.reshape(out.shape), second.reshape(out.shape), out=out)
        out.mul_(self.scale)

    def columns(self, shape: Sequence[int]) -> int | None:
        """How many columns the two factors have that it is in a tensor of this shape, the product of both ranks; None
        where it is no product of two matrices, or where that is no gain."""
        sides, one, other = (shape[0], math.prod(shape[1:])), self.first.columns, self.second.columns
        if one is None or other is None or (not self.kronecker and self.first.shape != sides):
            return None
        return one * other if 2 * one * other <= min(sides) else None

    def factors(self, read: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """These factors in float64, m×r and n×r: the mixed products of the factors of both, Kronecker's of all, or row
        by row."""
        count = len(self.first.infos)
        pairs = zip(self.first.factors(read[:count]), self.second.factors(read[count:]), strict=True)
        if self.kronecker:
            left, right = ((a[:, None, :, None] * b[:, None, :]).flatten(2).flatten(0, 1) for a, b in pairs)
        else:
            left, right = ((a[:, :, None] * b[:, None]).flatten(1) for a, b in pairs)
        return left * self.scale, right


class LoHa:
    """The Hadamard product of two products."""

    keys = _KEYS
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""

        def thin(weight: str, found: Module, rank: int) -> tuple[_Thin, _Thin]:
            infos = roles_of(fields, weight, found, self.roles[:4], self.roles)
            w1, w2, cores = infos[:2], infos[2:4], infos[4:]
            return (
                _thin(fields, weight, rank, w1, cores[0] if cores else None),
                _thin(fields, weight, rank, w2, cores[1] if cores else None),
            )

        return _pieces(fields, modules, thin, kronecker=False)


class LoKr:
    """The Kronecker product of two matrices, each of them whole or thin."""

    keys = _KEYS | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
    roles = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        ways = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        others = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))

        def thin(weight: str, found: Module, rank: int) -> tuple[_Thin, _Thin]:
            first = {role: info for role, info in found.items() if role.startswith("lokr_w1")}
            second = {role: info for role, info in found.items() if role not in first}
            w1 = roles_of(fields, weight, first, *ways)
            w2 = roles_of(fields, weight, second, *others)
            core, *pair = w2 if len(w2) == 3 else (None, *w2)
            return _thin(fields, weight, rank, w1, None), _thin(fields, weight, rank, tuple(filter(None, pair)), core)

        return _pieces(fields, modules, thin, kronecker=True)


def _pieces(
    fields: Fields,
    modules: Mapping[str, Module],
    thin: Callable[[str, Module, int], tuple[_Thin, _Thin]],
    *,
    kronecker: bool,
) -> dict[str, Piece]:
    if (begun := fields.body.get("init_weights", True)) not in _HARMLESS_INIT:
        raise Refuse(
            "adapter-kind",
            f"{fields.place}: init_weights = {shown(begun)} is not understood; "
            "merge the adapter into its base and publish that",
        )
    rank, alpha = fields.rank("r", 8), fields.number("alpha", 8)
    ranks, alphas = fields.ranks("rank_pattern").of(modules), fields.numbers("alpha_pattern").of(modules)
    pieces: dict[str, Piece] = {}
    for name, found in sorted(modules.items()):
        weight, r = f"{name}.weight", ranks.get(name, rank)
        first, second = thin(weight, found, r)
        pieces[weight] = Pair(str(fields.place), first, second, alphas.get(name, alpha) / r, kronecker)
    return pieces


def _thin(fields: Fields, weight: str, rank: int, infos: tuple[TensorInfo, ...], core: TensorInfo | None) -> _Thin:
    """The matrix that `infos` stand for, whole or two factors of this rank; with a Tucker `core` they lie across.
    Raises Refuse (`shape`)."""
    shapes = [info.shape for info in infos]
    fits = all(len(shape) == 2 for shape in shapes)
    shape: tuple[int, ...]
    if core is not None:
        fits &= len(core.shape) == 4 and core.shape[:2] == (rank, rank) and [s[0] for s in shapes] == [rank, rank]
        shape = (shapes[0][1], shapes[1][1], *core.shape[2:]) if fits else ()
    elif len(infos) == 2:
        fits &= fits and (shapes[0][1], shapes[1][0]) == (rank, rank)
        shape = (shapes[0][0], shapes[1][1]) if fits else ()
    else:
        fits, shape, rank = 2 <= len(shapes[0]) <= 4, shapes[0], 1
    if not fits:
        listed = " and ".join(str(list(info.shape)) for info in ((core, *infos) if core else infos))
        raise Refuse("shape", f"{fields.place}: factors of {weight} are {listed}, which do not fit its rank {rank}")
    return _Thin((core, *infos) if core else infos, shape, rank)
