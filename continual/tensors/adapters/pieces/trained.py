"""What a LoRA file of another trainer than PEFT adds to one tensor: a piece of one of PEFT's kinds, its alpha in a
tensor of its own, a DoRA scale, and perhaps only some of its rows, where one module of the trainer is several here.

Yeh et al. 2024, "LyCORIS", section 3, with the code of LyCORIS for what the paper leaves open: LoCon's core in the
middle, and DoRA's lengths of rows or of columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from continual.errors import Refuse
from continual.lazily import torch
from continual.tensors.adapters.pieces.contract import Piece, possible, unfit
from continual.tensors.checkpoints.header import TensorInfo

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Tucker:
    """up·mid·down: LoRA of a convolution with a core of its own (`lora_mid` of LoCon)."""

    where: str
    down: TensorInfo
    mid: TensorInfo
    up: TensorInfo
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The three tensors."""
        return (self.down.name, self.mid.name, self.up.name)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        down, mid, up = self.down.shape, self.mid.shape, self.up.shape
        fits = len(down) == len(mid) == len(up) == len(shape) == 4 and not transposed
        if not fits or (mid[0], mid[1]) != (up[1], down[0]) or (up[0], down[1], *mid[2:]) != shape:
            listed = f"{self.down.name} and its fellows are {list(down)}, {list(mid)} and {list(up)}"
            raise unfit(self.where, name, shape, listed)
        for rank in mid[:2]:
            possible(self.where, name, rank, shape)
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return "tucker"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 8 * (math.prod(shape) + math.prod(self.mid.shape) * shape[1])

    def add(
        self,
        read: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        out: torch.Tensor,
        *,
        transposed: bool,
    ) -> None:
        """As the protocol says."""
        down, mid, up = (tensor.float() for tensor in read)
        inner = torch.einsum("mnkl,ni->mikl", mid, down.flatten(1))
        torch.mm(up.flatten(1), inner.flatten(1), out=out.view(out.shape[0], -1))


@dataclass(frozen=True, slots=True)
class Difference:
    """What was added, as it is (`diff`, `diff_b` of LyCORIS)."""

    where: str
    info: TensorInfo
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        if self.info.shape != shape or transposed:
            raise unfit(self.where, name, shape, f"{self.info.name} is {list(self.info.shape)}")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return "difference"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 0

    def add(
        self,
        read: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        out: torch.Tensor,
        *,
        transposed: bool,
    ) -> None:
        """As the protocol says."""
        out.copy_(read[0].float().reshape(out.shape))


@dataclass(frozen=True, slots=True)
class Trained:
    """What `inner` adds at scale 1, times `scale` and, where there is one, the value of `alpha`. `lengths`: those to
    which DoRA brings what comes of it, `by_rows` or as their shape says."""

    where: str
    inner: Piece
    scale: float
    alpha: TensorInfo | None = None
    lengths: TensorInfo | None = None
    by_rows: bool = True
    optional = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the inner piece, alpha, and the lengths."""
        return (*self.inner.names, *(info.name for info in (self.alpha, self.lengths) if info is not None))

    @property
    def needs_base(self) -> bool:
        """DoRA does."""
        return self.lengths is not None

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        found = self.inner.fit(name, shape, transposed=transposed)
        if self.lengths is not None and (found != shape or self._axis(shape) is None):
            raise unfit(self.where, name, shape, f"{self.lengths.name} is {list(self.lengths.shape)}")
        return found

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        kind = "dora" if self.lengths is not None else "scaled"
        return f"{kind} {self.scale!r} {self.alpha is not None} {self.inner.settings(transposed=transposed)}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return self.inner.workspace(shape) + (12 * math.prod(shape) if self.lengths is not None else 0)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        count = len(self.inner.names)
        self.inner.add(read[:count], base, out, transposed=transposed)
        out.mul_(self._factor(read))
        if self.lengths is None:
            return
        assert base is not None
        lengths = read[-1].float()
        along = self._axis(tuple(out.shape))
        assert along is not None
        flat = base.reshape(out.shape)
        whole = flat + out
        over = [axis for axis in range(out.dim()) if axis != along]
        now = torch.linalg.vector_norm(whole, dim=over, keepdim=True)
        out.copy_(whole.mul_(lengths.reshape(now.shape) / now)).sub_(flat)

    def of_left(self, left: torch.Tensor, read: Sequence[torch.Tensor]) -> torch.Tensor:
        """The left one of two factors of the whole, from that of what is inside; without lengths."""
        return left * self._factor(read)

    def _factor(self, read: Sequence[torch.Tensor]) -> float:
        return self.scale * (1.0 if self.alpha is None else float(read[len(self.inner.names)].float().reshape(-1)[0]))

    def _axis(self, shape: tuple[int, ...]) -> int | None:
        return None if self.lengths is None else _along(self.lengths.shape, shape, by_rows=self.by_rows)


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Some rows of what `inner` adds to a tensor of `total` rows: those of one of the tensors that it is in the base,
    in this order."""

    where: str
    inner: Piece
    rows: Rows
    total: int
    optional = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the inner piece."""
        return self.inner.names

    @property
    def needs_base(self) -> bool:
        """As the inner piece; `of` lets none through that does."""
        return self.inner.needs_base

    @classmethod
    def of(cls, where: str, inner: Piece, rows: Rows, total: int) -> RowsOf:
        """Raises Refuse (`adapter-kind`) where the rows depend on values that lie in several tensors of the base."""
        if inner.needs_base:
            raise Refuse(
                "adapter-kind",
                f"{where}: {inner.names[0]} is a part of DoRA on a module that is several in the base, which cannot be "
                "folded: merge the file into its base with the program that it was made for and publish that",
            )
        return cls(where, inner, rows, total)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        whole = (self.total, *shape[1:])
        if self.inner.fit(name, whole, transposed=transposed) != whole:
            raise unfit(self.where, name, whole, f"{self.names[0]} and its fellows have other rows")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"rows {self.rows} of {self.total} {self.inner.settings(transposed=transposed)}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        whole = (self.total, *shape[1:])
        return self.inner.workspace(whole) + 4 * math.prod(whole) + 4 * math.prod(shape)

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        whole = torch.empty(self.total, *out.shape[1:])
        self.inner.add(read, base, whole, transposed=transposed)
        out.copy_(self.of_left(whole, read))

    def of_left(self, left: torch.Tensor, read: Sequence[torch.Tensor]) -> torch.Tensor:
        """These rows of the left one of two factors, or of the whole."""
        return torch.cat([left[start:stop] for start, stop in self.rows])


def _along(lengths: Sequence[int], shape: Sequence[int], *, by_rows: bool) -> int | None:
    """The axis of a weight of this shape that lengths belong to: the first, or, where not always `by_rows`, the second
    that older versions of LyCORIS have; None where they fit neither."""
    numel = math.prod(lengths)
    if not by_rows and len(lengths) > 1 and lengths[0] == 1 and len(shape) > 1:
        return 1 if lengths[1] == shape[1] == numel else None
    return 0 if numel == shape[0] and numel in lengths else None
