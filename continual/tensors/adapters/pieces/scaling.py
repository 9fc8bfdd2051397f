"""Adapters that scale what is there: IA³, whose vectors scale the outputs (or inputs) of a layer, and VeRA, whose
vectors scale two random matrices that all layers share.

Liu et al. 2022, "Few-shot parameter-efficient fine-tuning", section 3.3; Kopiczko et al. 2024, "VeRA", equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from continual.errors import Refuse
from continual.lazily import torch
from continual.outside import shown
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.pieces.contract import Module, Piece, possible, roles_of, unfit
from continual.tensors.checkpoints.header import TensorInfo

_SHARED = "base_model"
"""The module that VeRA's shared matrices stand in, in the names of its tensors."""
_WIDER, _LONGER = 64, 4
"""How many times wider and longer than the longest output VeRA's shared matrices may be. They are as large as the
largest layer that was trained with them, and a file with holes can claim any size."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """W∘(l − 1): what scaling a layer's inputs (`inputs`) or outputs by `l` adds to its weight."""

    where: str
    info: TensorInfo
    inputs: bool
    optional = False
    needs_base = True

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says. A grouped convolution has more inputs than its weight has columns."""
        count = math.prod(self.info.shape)
        fits = len(shape) >= 2
        if fits and self.inputs and len(shape) > 2:
            groups = count // max(1, shape[1])
            fits = groups * shape[1] == count and groups > 0 and shape[0] % groups == 0
        elif fits:
            fits = count == shape[self.inputs != transposed]
        if not fits:
            along = "inputs" if self.inputs else "outputs"
            raise unfit(self.where, name, shape, f"{self.info.name} scales {count} {along}")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"ia3 {self.inputs} {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says. The scale of a grouped convolution's inputs is spread over its outputs."""
        return 4 * math.prod(shape[:2])

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        assert base is not None
        less = read[0].float().reshape(-1) - 1
        if self.inputs and out.dim() > 2:
            groups = len(less) // out.shape[1]
            less = less.view(groups, 1, -1).expand(groups, out.shape[0] // groups, out.shape[1]).reshape(out.shape[:2])
            torch.mul(base, less.view(*less.shape, *(1,) * (out.dim() - 2)), out=out)
        else:
            along = 1 if self.inputs != transposed else 0
            torch.mul(base, less.view([-1 if i == along else 1 for i in range(out.dim())]), out=out)


@dataclass(frozen=True, slots=True)
class ScaledBias:
    """b∘(l − 1): the same for the layer's bias, where it has one."""

    where: str
    info: TensorInfo
    optional = True
    needs_base = True

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        if shape != (math.prod(self.info.shape),):
            raise unfit(self.where, name, shape, f"{self.info.name} scales {math.prod(self.info.shape)} outputs")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return "ia3 bias"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 4 * math.prod(shape)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        assert base is not None
        torch.mul(base, read[0].float().reshape(-1) - 1, out=out)


class IA3:
    """IA³ as PEFT saves it: the vector of a feed-forward layer scales its inputs, any other vector the outputs."""

    keys = frozenset(["feedforward_modules", "fan_in_fan_out", "init_ia3_weights"])
    roles = ("ia3_l",)

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        where = str(fields.place)
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            (info,) = roles_of(fields, f"{name}.weight", found, self.roles)
            inputs = _scales_inputs(fields, name, info)
            pieces[f"{name}.weight"] = Scaled(where, info, inputs)
            if not inputs:
                pieces[f"{name}.bias"] = ScaledBias(where, info)
        return pieces


def _scales_inputs(fields: Fields, module: str, info: TensorInfo) -> bool:
    """Whether the module is one of `feedforward_modules`. Of a linear layer the shape says it: 1 × in, or out × 1."""
    shape = info.shape
    if len(shape) == 2 and 1 in shape and shape != (1, 1):
        return shape[0] == 1
    ends = fields.body.get("feedforward_modules") or []
    if len(shape) < 2 or math.prod(shape) != shape[shape[0] == 1]:
        raise Refuse("shape", f"{fields.place}: {info.name} is {list(shape)}, which scales neither inputs nor outputs")
    if not isinstance(ends, list) or any(not isinstance(end, str) for end in ends):
        raise Refuse(
            "config",
            f"{fields.where}: feedforward_modules = {shown(ends)} is no list of names, "
            f"and whether {module} is one of them decides what {info.name} scales",
        )
    return any(module.endswith(end) for end in ends)


@dataclass(frozen=True, slots=True)
class Shared:
    """(b∘B)·(d∘A): vectors `b` and `d` of one layer, and the beginnings of matrices that all layers share."""

    where: str
    b: TensorInfo
    d: TensorInfo
    rows: TensorInfo
    columns: TensorInfo
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The vectors, B and A."""
        return (self.b.name, self.d.name, self.rows.name, self.columns.name)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        rank = self.columns.shape[0]
        rows, columns = shape[::-1] if transposed else shape if len(shape) == 2 else (0, 0)
        if len(shape) != 2 or self.b.shape != (rows,) or self.rows.shape[0] < rows or self.columns.shape[1] < columns:
            raise unfit(
                self.where,
                name,
                shape,
                f"{self.b.name} is {list(self.b.shape)}, and the shared matrices {list(self.rows.shape)} and "
                f"{list(self.columns.shape)}",
            )
        possible(self.where, name, rank, (self.rows.shape[0], self.columns.shape[1]))
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"vera {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 4 * (math.prod(self.rows.shape) + math.prod(self.columns.shape))

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        b, d, rows, columns = (tensor.float() for tensor in read)
        height, width = out.shape[::-1] if transposed else out.shape
        left = b[:, None] * rows[:height]
        right = d[:, None] * columns[:, :width]
        if transposed:
            torch.mm(right.T, left.T, out=out)
        else:
            torch.mm(left, right, out=out)

    def factors(
        self, read: Sequence[torch.Tensor], shape: Sequence[int], *, transposed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What it adds to a tensor of this shape as left·rightᵀ, m×r and n×r in float64."""
        b, d, rows, columns = (tensor.double() for tensor in read)
        return _vera(b, d, (rows, columns), shape[::-1] if transposed else shape, transposed=transposed)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The same where the file has no B and A: PEFT draws both from `seed`, for `outputs` rows, the most of an adapted
    layer, and for `inputs` columns. These are those of the base: whoever matches the two says them."""

    where: str
    b: TensorInfo
    d: TensorInfo
    seed: int
    outputs: int
    inputs: int = 0
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The vectors."""
        return (self.b.name, self.d.name)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        if len(shape) != 2 or self.b.shape != (shape[1 if transposed else 0],):
            raise unfit(self.where, name, shape, f"{self.b.name} is {list(self.b.shape)}")
        possible(self.where, name, self.d.shape[0], shape)
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"vera {self.seed} {self.outputs} {self.inputs} {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 12 * self.d.shape[0] * (self.outputs + self.inputs)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        b, d = (tensor.float() for tensor in read)
        rows, columns = self._matrices(len(d))
        height, width = out.shape[::-1] if transposed else out.shape
        product = (b[:, None] * rows[:height]) @ (d[:, None] * columns[:, :width])
        out.copy_(product.T if transposed else product)

    def factors(
        self, read: Sequence[torch.Tensor], shape: Sequence[int], *, transposed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `Shared`."""
        b, d = (tensor.double() for tensor in read)
        rows, columns = self._matrices(len(d))
        return _vera(b, d, (rows, columns), shape[::-1] if transposed else shape, transposed=transposed)

    def _matrices(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A as PEFT draws them."""
        generator = torch.Generator().manual_seed(self.seed)
        columns = _uniform((rank, self.inputs), generator)
        return _uniform((self.outputs, rank), generator), columns


def _vera(
    b: torch.Tensor,
    d: torch.Tensor,
    drawn: tuple[torch.Tensor, torch.Tensor],
    shape: Sequence[int],
    *,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of (b∘B)·(d∘A) of this shape, outputs × inputs; the other way round where they are stored so."""
    (rows, columns), (height, width) = drawn, shape
    left, right = b[:, None] * rows[:height].double(), (d[:, None] * columns[:, :width].double()).mT
    return (right, left) if transposed else (left, right)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Numbers as Kaiming's initialisation draws them."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class VeRA:
    """VeRA as PEFT saves it, with its projections in the file or without."""

    keys = frozenset(
        [
            "r",
            "projection_prng_key",
            "save_projection",
            "vera_dropout",
            "d_initial",
            "fan_in_fan_out",
            "bias",
            "init_weights",
        ]
    )
    roles = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        shared = modules.get(_SHARED, {})
        if not shared and not fields.flag("save_projection", default=True):
            return self._drawn(fields, modules)
        columns, rows = roles_of(fields, _SHARED, shared, self.roles[2:])
        rank = fields.rank("r")
        if len(columns.shape) != 2 or len(rows.shape) != 2 or (columns.shape[0], rows.shape[1]) != (rank, rank):
            raise Refuse(
                "shape",
                f"{fields.place}: {columns.name} is {list(columns.shape)} and {rows.name} {list(rows.shape)}, "
                f"which do not fit the rank {rank}",
            )
        pieces: dict[str, Piece] = {}
        for name in sorted(modules.keys() - {_SHARED}):
            weight = f"{name}.weight"
            b, d = roles_of(fields, weight, modules[name], self.roles[:2])
            if d.shape != (rank,):
                raise Refuse("shape", f"{fields.place}: {d.name} is {list(d.shape)}, and the rank is {rank}")
            pieces[weight] = Shared(str(fields.place), b, d, rows, columns)
        longest = max((math.prod(modules[name][self.roles[0]].shape) for name in modules.keys() - {_SHARED}), default=0)
        if rows.shape[0] > _LONGER * longest or columns.shape[1] > _WIDER * longest:
            raise Refuse(
                "shape",
                f"{fields.place}: {columns.name} is {list(columns.shape)} and {rows.name} {list(rows.shape)}, "
                f"more than layers with at most {longest} outputs can need",
            )
        return pieces

    def _drawn(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        rank, seed = fields.rank("r", 256), fields.body.get("projection_prng_key", 0)
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise Refuse("config", f"{fields.where}: projection_prng_key = {shown(seed)} is no seed")
        pairs = {name: roles_of(fields, f"{name}.weight", found, self.roles[:2]) for name, found in modules.items()}
        for b, d in pairs.values():
            if d.shape != (rank,) or len(b.shape) != 1:
                raise Refuse(
                    "shape",
                    f"{fields.place}: {b.name} is {list(b.shape)} and {d.name} {list(d.shape)}, and the rank is {rank}",
                )
        outputs = max((b.shape[0] for b, _ in pairs.values()), default=0)
        where = str(fields.place)
        return {f"{name}.weight": Drawn(where, b, d, seed, outputs) for name, (b, d) in sorted(pairs.items())}


class LNTuning:
    """LN tuning as PEFT saves it: whole layers of normalisation, which replace the base's. There are no pieces."""

    keys: frozenset[str] = frozenset()
    roles: tuple[str, ...] = ()

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        return {}
