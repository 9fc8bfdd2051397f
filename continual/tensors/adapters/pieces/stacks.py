"""LoRA on the parameters of a module (`target_parameters` of PEFT): on packed experts above all.

PEFT lays the factors of E experts of rank r into two matrices: A is (E·r) × in, expert by expert; B is out × (r·E), and
in each of its rows the experts run fastest. All versions of PEFT agree on that (0.17 to 0.21). They differ in which
axis of the parameter they take for `in`.

The file does not say which parameter of a module a pair is of. Of several, PEFT wraps one in the other, and the inner
ones have `base_layer` in their names. So a pair stays `Wrapped` until the base is known (stacked.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from continual.errors import Refuse
from continual.lazily import torch
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.pieces.contract import Module, Piece, possible, unfit
from continual.tensors.checkpoints.header import TensorInfo

TARGETS = "target_parameters"
_LEVEL = ".base_layer"
_MOST_LEVELS = 8
"""Parameters of one module that an adapter adapts."""


class FactorPair(NamedTuple):
    """The factors A and B of one parameter."""

    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class Wrapped:
    """The pairs of a module some of whose parameters may be adapted, the innermost first. `params`: rank and scale of
    each parameter that may be meant. `plain`: what the pair is if it is that of a linear layer after all, or why it can
    be none. It stands for a piece until the base says which it is."""

    where: str
    module: str
    pairs: tuple[FactorPair, ...]
    params: Mapping[str, tuple[int, float]]
    plain: Mapping[str, Piece] | Refuse
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The factors of all pairs."""
        return tuple(info.name for pair in self.pairs for info in pair)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """Raises Refuse (`shape`): it fits nothing before it is known what it is."""
        raise unfit(self.where, name, shape, f"{self.pairs[0].a.name} is one of {len(self.pairs)} nested pairs")

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says; never asked."""
        return f"wrapped {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says; never asked."""
        return 0

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """Raises Refuse as `fit`."""
        self.fit(self.module, tuple(out.shape), transposed=transposed)


@dataclass(frozen=True, slots=True)
class StackFactors:
    """scale·B·A for each of `experts` in one tensor. `by_input`: the tensor has them as in × out."""

    where: str
    pair: FactorPair
    experts: int
    rank: int
    scale: float
    by_input: bool
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """A and B."""
        return (self.pair.a.name, self.pair.b.name)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        inner, outer = self.pair.a.shape[1], self.pair.b.shape[0]
        found = (self.experts, *((inner, outer) if self.by_input else (outer, inner)))
        if found != shape:
            raise unfit(self.where, name, shape, f"the products of {self.names[1]} and {self.names[0]} are {found}")
        possible(self.where, name, self.rank, found[1:])
        return found

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"stacked {self.scale!r} {self.experts} {self.by_input}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says: one expert's B is made contiguous."""
        return 4 * self.rank * sum(shape[1:])

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        for number in range(self.experts):
            self.add_one(read, number, out[number])

    def add_one(self, read: Sequence[torch.Tensor], number: int, out: torch.Tensor) -> None:
        """Writes what is added to one expert into `out`."""
        a = read[0].view(self.experts, self.rank, -1)[number].float()
        b = read[1].view(-1, self.rank, self.experts)[:, :, number].float()
        if self.by_input:
            torch.mm(a.T, b.T, out=out)
        else:
            torch.mm(b, a, out=out)
        out.mul_(self.scale)


class Portion(NamedTuple):
    """What is added to the rows from `start` to `stop` of one expert."""

    number: int
    start: int
    stop: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Gathered:
    """The pieces of experts that stand one by one in the adapter and are packed in the base, or those of dense layers
    that the base has fused: these are parts of one matrix, number 0."""

    where: str
    shares: tuple[Portion, ...]
    optional = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all pieces."""
        return tuple(name for share in self.shares for name in share.piece.names)

    @property
    def needs_base(self) -> bool:
        """Where one of the pieces does."""
        return any(share.piece.needs_base for share in self.shares)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        for share in self.shares:
            part = (share.stop - share.start, shape[-1])
            what = f"expert {share.number} of {name}" if len(shape) == 3 else f"rows {share.start} on of {name}"
            if share.piece.fit(what, part, transposed=False) != part:
                raise unfit(self.where, what, part, f"{share.piece.names[0]} makes it")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        said = blake3()
        for share in self.shares:
            said.update(f"{share[:3]} {share.piece.settings(transposed=False)}\n".encode())
        return f"gathered {said.hexdigest()}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return max(share.piece.workspace((share.stop - share.start, shape[-1])) for share in self.shares)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        out.zero_()
        if out.dim() == 2:
            out, base = out.unsqueeze(0), None if base is None else base.unsqueeze(0)
        at = 0
        for number, start, stop, piece in self.shares:
            mine = read[at : at + len(piece.names)]
            at += len(mine)
            piece.add(
                mine, None if base is None else base[number, start:stop], out[number, start:stop], transposed=False
            )

    def add_one(self, read: Sequence[torch.Tensor], number: int, out: torch.Tensor) -> None:
        """Writes what is added to one expert into `out`."""
        out.zero_()
        at = 0
        for share in self.shares:
            mine = read[at : at + len(share.piece.names)]
            at += len(mine)
            if share.number == number:
                share.piece.add(mine, None, out[share.start : share.stop], transposed=False)


def part_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what of a tensor is multiplied out at a time: one expert, or all of a matrix."""
    return shape[1:] if len(shape) == 3 else shape


def runs_of(
    piece: StackFactors | Gathered,
    read: Sequence[torch.Tensor],
    shape: tuple[int, ...],
    ranges: Iterable[tuple[int, int]],
    buffer: Callable[[str, int, torch.dtype], torch.Tensor],
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """What is added to a stack of this shape in flat runs, as `TaskVectors.runs`: no more than one expert is multiplied
    out at a time. `buffer` gives the memory of a run."""
    one, here = torch.empty(part_of(shape)), -1
    numel = one.numel()
    for start, stop in ranges:
        tau = buffer("tau", stop - start, torch.float32)
        at = start
        while at < stop:
            number, within = divmod(at, numel)
            if number != here:
                piece.add_one(read, number, one)
                here = number
            until = min(stop, at + numel - within)
            tau[at - start : until - start] = one.view(-1)[within : within + until - at]
            at = until
        yield start, stop, tau


def targeted(fields: Fields, modules: Mapping[str, Module]) -> dict[str, dict[str, tuple[int, float]]]:
    """The modules whose parameters the configuration's `target_parameters` may name, without `base_layer`; of each the
    parameters, with rank and scale. Raises Refuse (`config`)."""
    ends: dict[str, set[str]] = {}
    for target in fields.names(TARGETS):
        module, _, param = target.rpartition(".")
        ends.setdefault(module, set()).add(param)
    found: dict[str, set[str]] = {}
    for name in {bare(name) for name in modules} if ends else ():
        parts = name.split(".")
        tails = [""] + [".".join(parts[at:]) for at in range(len(parts))]
        params = {param for tail in tails for param in ends.get(tail, ())}
        if params:
            found[name] = params
    keys = {f"{name}.{param}" for name, params in found.items() for param in params}
    ranks, alphas = fields.ranks("rank_pattern").of(keys), fields.numbers("alpha_pattern").of(keys)
    rank, alpha = fields.rank("r", 8), fields.number("lora_alpha", 8)
    by_root = fields.flag("use_rslora")

    def setting(key: str) -> tuple[int, float]:
        r = ranks.get(key, rank)
        return r, alphas.get(key, alpha) / (math.sqrt(r) if by_root else r)

    return {
        name: {param: setting(f"{name}.{param}") for param in sorted(params)} for name, params in sorted(found.items())
    }


def bare(name: str) -> str:
    """The name of a module without the levels that PEFT has put around it."""
    while name.endswith(_LEVEL):
        name = name.removesuffix(_LEVEL)
    return name


def levels(module: str, modules: Mapping[str, Module]) -> tuple[str, ...]:
    """The names of a module's levels that have factors, the innermost first."""
    found = [name for depth in range(_MOST_LEVELS) if (name := module + _LEVEL * depth) in modules]
    return tuple(reversed(found))
