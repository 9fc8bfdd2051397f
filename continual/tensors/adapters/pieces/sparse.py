"""Adapters that are few numbers at places of a weight or of its spectrum: SHiRA, blocks that are repeated (MiSS, which
was called Bone), and FourierFT.

Bhardwaj et al. 2024, "SHiRA", section 3; Kang and Yin 2024, "Bone", sections 3.1 and 3.2; Gao et al. 2024, "FourierFT",
equations 2 to 4.
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
from continual.tensors.adapters.pieces.contract import Module, Piece, roles_of, unfit
from continual.tensors.checkpoints.header import TensorInfo


@dataclass(frozen=True, slots=True)
class Scattered:
    """The numbers `values` at the rows and columns `places`."""

    where: str
    values: TensorInfo
    places: TensorInfo
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The values and their places."""
        return (self.values.name, self.places.name)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says. PEFT has none for layers that store in × out."""
        count = math.prod(self.values.shape)
        if transposed or len(shape) != 2 or count > math.prod(shape) or self.places.shape != (2, count):
            raise unfit(
                self.where,
                name,
                shape,
                f"{self.values.name} has {count} numbers at the places {list(self.places.shape)}",
            )
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return "shira"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 24 * math.prod(self.values.shape)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says. Raises Refuse (`shape`) for a place outside of the weight."""
        rows, columns = read[1].long()
        inside = (rows >= 0) & (rows < out.shape[0]) & (columns >= 0) & (columns < out.shape[1])
        if not bool(inside.all()):
            raise Refuse(
                "shape", f"{self.where}: {self.places.name} names places outside of a weight of shape {list(out.shape)}"
            )
        out.zero_()
        out.index_put_((rows, columns), read[0].float().reshape(-1), accumulate=True)


class Shira:
    """SHiRA as PEFT saves it. On Windows it saves the places as floats."""

    keys = frozenset(["r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"])
    roles = ("shira_weight", "shira_indices")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        return {
            f"{name}.weight": Scattered(str(fields.place), *roles_of(fields, f"{name}.weight", found, self.roles))
            for name, found in sorted(modules.items())
        }


@dataclass(frozen=True, slots=True)
class Repeated:
    """One block of `inputs` × outputs, repeated along the inputs of a weight, and as `mini` along its outputs too; as
    `bat` it is a block B for each group of outputs, and W·B + B is added to each block W of the weight."""

    where: str
    info: TensorInfo
    form: Literal["whole", "mini", "bat"]
    optional = False

    @property
    def needs_base(self) -> bool:
        """`bat` does."""
        return self.form == "bat"

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says. PEFT has none for layers that store in × out."""
        block, fits = self.info.shape, len(shape) == 2 and not transposed
        if fits and self.form == "bat":
            fits = block[0] * block[2] == shape[0] and shape[1] % block[2] == 0
        elif fits:
            fits = block[0] <= shape[1] and (shape[0] % block[1] == 0 if self.form == "mini" else shape[0] == block[1])
        if not fits:
            stored = ", which is stored transposed" if transposed else ""
            raise unfit(self.where, name, shape, f"{self.info.name} is {list(block)}{stored}")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"repeated {self.form}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 8 * math.prod(shape) if self.form == "bat" else 4 * shape[0] * self.info.shape[0]

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        block = read[0].float()
        rows, columns = out.shape
        if self.form == "bat":
            assert base is not None
            size = block.shape[-1]
            parts = base.view(rows // size, size, columns // size, size).transpose(1, 2)
            out.view(rows // size, size, columns // size, size).copy_(
                (parts @ block[:, None] + block[:, None]).transpose(1, 2)
            )
            return
        turned = block.T.repeat(rows // block.shape[1], 1)
        for start in range(0, columns, block.shape[0]):
            part = out[:, start : start + block.shape[0]]
            part.copy_(turned[:, : part.shape[1]])

    def factors(self, read: Sequence[torch.Tensor], shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What it adds to a tensor of this shape as left·rightᵀ, m×r and n×r in float64; not as `bat`."""
        block = read[0].double()
        left = block.mT.repeat(shape[0] // block.shape[1], 1)
        return left, torch.eye(len(block), dtype=torch.float64).repeat(-(-shape[1] // len(block)), 1)[: shape[1]]


class Miss:
    """MiSS as PEFT saves it, or Bone, which it was until 0.16."""

    keys = frozenset(["r", "mini_r", "miss_dropout", "init_weights", "bias"])

    def __init__(self, role: str) -> None:
        self.roles: tuple[str, ...] = (role,)

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        word = fields.body.get("init_weights", True)
        form: Literal["whole", "mini", "bat"]
        if word == "bat" or word == "mini":
            form = "bat" if word == "bat" else "mini"
        elif word in (True, False):
            form = "whole"
        else:
            raise Refuse("adapter-kind", f"{fields.place}: init_weights = {shown(word)} is not understood; {MERGE}")
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            (info,) = roles_of(fields, f"{name}.weight", found, self.roles)
            shape = info.shape
            if 0 in shape or len(shape) != (3 if form == "bat" else 2) or (form == "bat" and shape[1] != shape[2]):
                raise Refuse(
                    "shape",
                    f"{fields.place}: {info.name} is {list(shape)}, no block with init_weights = {shown(word)}",
                )
            pieces[f"{name}.weight"] = Repeated(str(fields.place), info, form)
        return pieces


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The real part of the inverse Fourier transform of a few numbers, at places that are drawn from `seed`."""

    where: str
    info: TensorInfo
    seed: int
    scale: float
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        if len(shape) != 2 or math.prod(self.info.shape) > math.prod(shape):
            raise unfit(self.where, name, shape, f"{self.info.name} is {list(self.info.shape)}")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"fourierft {self.seed} {self.scale!r} {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says. The places are drawn from all, each as eight bytes."""
        return (8 + 4 + 16) * math.prod(shape)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        values = read[0].float().reshape(-1)
        rows, columns = out.shape[::-1] if transposed else out.shape
        drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(self.seed))[: len(values)]
        spectrum = torch.zeros(rows * columns)
        spectrum[drawn] = values
        del drawn
        found = torch.fft.ifft2(spectrum.view(rows, columns)).real
        torch.mul(found.T if transposed else found, self.scale, out=out)


class FourierFT:
    """FourierFT as PEFT saves it: where its numbers stand follows from a seed, by torch's generator."""

    keys = frozenset(
        [
            "n_frequency",
            "scaling",
            "random_loc_seed",
            "fan_in_fan_out",
            "bias",
            "n_frequency_pattern",
            "init_weights",
        ]
    )
    roles = ("fourierft_spectrum",)

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        seed, scale = fields.body.get("random_loc_seed", 777), fields.number("scaling", 150.0)
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise Refuse("config", f"{fields.where}: random_loc_seed = {shown(seed)} is no seed")
        many = fields.rank("n_frequency", 1000)
        patterns = fields.ranks("n_frequency_pattern").of(modules)
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            (info,) = roles_of(fields, f"{name}.weight", found, self.roles)
            if info.shape != (patterns.get(name, many),):
                raise Refuse(
                    "shape",
                    f"{fields.place}: {info.name} is {list(info.shape)}, "
                    f"and the configuration says {patterns.get(name, many)} frequencies",
                )
            pieces[f"{name}.weight"] = Spectrum(str(fields.place), info, seed, scale)
        return pieces
