"""Exact kernels that the rules share: float64 reductions in chunks, and the right singular vectors of a matrix from its
float64 Gram.

No rule and no decision about tensors lives here. All work is bounded by the small side: beyond its inputs a kernel
holds a few n×n float64 matrices and a few blocks of rows. Float32 Grams have no place here: they are wrong by 1e-2. Nor
has a random sample of directions that leaves any out, since it cannot give Σσ: `span` has all of them, or says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from continual.lazily import Tensor, torch
from continual.lazily import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
else:
    Floats = "numpy.ndarray"  # for annotations alone

BLOCK = 1 << 19
"""Elements of a block of rows in float64 (4 MiB): large enough for GEMM, small enough that six of them never matter."""
CHUNK = 1 << 18
PIECE = 1 << 16
"""Elements that a pass over float32 takes at a time on a CPU: three operands of 256 KiB stay in the cache of a core. In
a quarter of that the calls cost as much as the work."""
ROW = 1 << 10
SMALL = 16 * ROW
"""Elements up to which float32 saves `inner` nothing, and few rows average its rounding out."""
NULL = 1e-6
"""Singular values at or below this fraction of the largest count as zero."""
STEEP = 1e-4
"""Below this fraction of the largest a singular value of a Gram is refined: the Gram's error there is about ε·(σ₁/σ)².
"""


def pieces(numel: int, length: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Flat ranges that are a multiple of ROW long, and one tail shorter than ROW."""
    whole = numel - numel % ROW
    for start in range(0, whole, length):
        yield start, min(start + length, whole)
    if whole < numel:
        yield whole, numel


def _rows(values: Tensor) -> Tensor:
    """Sums of rows of ROW elements. A row is summed by one thread in a fixed order, so the bits do not depend on the
    number of threads."""
    return values.view(-1, min(ROW, values.numel())).sum(1)


def dot(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ of two tensors of one shape, in float64, without a float64 copy of either; the same bits whatever the
    number of threads."""
    a, b = a.reshape(-1), b.reshape(-1)
    parts = [_rows(a[i:j].double() * b[i:j].double()) for i, j in pieces(a.numel())]
    return math.fsum(torch.cat(parts).tolist()) if parts else 0.0


def inner(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ for reports and norms, at a tenth of the cost of `dot`: rows of ROW products are summed in float32 and the
    rows in float64.

    Right to about 1e-8 of ‖a‖‖b‖. Where float32 over- or underflows, or the tensors are small, it is `dot` that
    answers. The same bits whatever the number of threads.
    """
    return inners((a, b))[0]


def inners(*pairs: tuple[Tensor, Tensor]) -> list[float]:
    """`inner` of several pairs of tensors of one size, for less than one after the other."""
    flat = [(a.reshape(-1), b.reshape(-1)) for a, b in pairs]
    numel, on_cpu = flat[0][0].numel(), all(a.is_cpu and b.is_cpu for a, b in flat)
    if numel <= SMALL:
        return [dot(a, b) for a, b in flat]
    if not on_cpu:
        return _inners_on_device(flat)
    arrays = [(_array(a), _array(b)) for a, b in flat]
    rows = RowSums(len(flat), numel)
    with rows:
        for i, j in pieces(numel, PIECE):
            for k, (left, right) in enumerate(arrays):
                rows.take(k, i, _floats(left[i:j]), _floats(right[i:j]))
    return rows.totals()


def _array(values: Tensor) -> Floats | Tensor:
    """A flat tensor as an array, where nothing has to be converted."""
    return values.detach().numpy() if values.dtype == torch.float32 else values.detach()


def _floats(piece: Floats | Tensor) -> Floats:
    return piece if isinstance(piece, np.ndarray) else piece.float().numpy()


def _inners_on_device(flat: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """`inners` of flat tensors on an accelerator."""
    parts = []
    for i, j in pieces(flat[0][0].numel()):
        width = min(ROW, j - i)
        parts.append(
            torch.stack(
                [torch.linalg.vecdot(a[i:j].float().view(-1, width), b[i:j].float().view(-1, width)) for a, b in flat]
            )
        )
    totals: list[float] = torch.cat(parts, 1).double().sum(1).tolist()
    return [
        total if math.isfinite(total) and total != 0.0 else dot(a, b)
        for total, (a, b) in zip(totals, flat, strict=True)
    ]


class RowSums:
    """Inner products of float32 arrays, `count` of them, taken piece by piece: the sum of each row of ROW products.

    BLAS sums a row, asked by NumPy: what torch has for many short rows writes all products first. A row is too short
    for the threads of BLAS, so the bits do not depend on their number. A context: within it NumPy does not warn of what
    over- or underflows, which is seen here.
    """

    def __init__(self, count: int, numel: int) -> None:
        self._rows = np.zeros((count, -(-numel // ROW)), np.float32)
        self._apart: list[list[float]] = [[] for _ in range(count)]
        self._quiet = np.errstate(all="ignore")

    def __enter__(self) -> None:
        self._quiet.__enter__()

    def __exit__(self, *_: object) -> None:
        self._quiet.__exit__(None, None, None)

    def take(self, index: int, start: int, a: Floats, b: Floats) -> None:
        """Adds a flat piece of each to the product `index`; it begins at element `start`, at a multiple of ROW."""
        first, width = start // ROW, min(ROW, len(a))
        found = self._rows[index, first : first + len(a) // width]
        np.matmul(a.reshape(-1, 1, width), b.reshape(-1, width, 1), out=found[:, None, None])
        total = float(np.add.reduce(found))
        if total == 0.0 or not math.isfinite(total):
            # where one of the two is zeros, as X is before the first fold, nothing underflowed
            sure = total == 0.0 and (_is_zeros(a) or _is_zeros(b))
            self._apart[index].append(0.0 if sure else dot(torch.from_numpy(a), torch.from_numpy(b)))
            found.fill(0.0)

    def totals(self) -> list[float]:
        """The products."""
        rows = self._rows.sum(1, np.float64).tolist()
        return [row + math.fsum(apart) for row, apart in zip(rows, self._apart, strict=True)]


def _is_zeros(values: Floats) -> bool:
    return bool(values.max() == 0.0 == values.min())


class Added(NamedTuple):
    """An addition: ‖term‖², ⟨term, total before⟩ and ‖total after‖²."""

    term_sq: float
    dot: float
    total_sq: float


def add(total: Tensor, term: Tensor, weight: float) -> Added:
    """total += weight·term in place; contiguous float32 tensors of one shape. On a CPU in one pass: what is added and
    multiplied is in the cache from the first to the last time that it is used."""
    if total.numel() <= SMALL or not total.is_cpu:
        term_sq, product = inners((term, term), (term, total))
        total.add_(term, alpha=weight)
        return Added(term_sq, product, inner(total, total))
    x, t = total.view(-1).numpy(), term.view(-1).numpy()
    rows = RowSums(3, len(x))
    with rows:
        for i, j in pieces(len(x), PIECE):
            here, change = x[i:j], t[i:j]
            rows.take(0, i, change, change)
            rows.take(1, i, change, here)
            if weight == 1.0:
                np.add(here, change, out=here)
            else:
                torch.from_numpy(here).add_(torch.from_numpy(change), alpha=weight)
            rows.take(2, i, here, here)
    return Added(*rows.totals())


def tall(matrix: Tensor) -> Tensor:
    """The view of an m×n matrix, or of its transpose, that has at least as many rows as columns."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Row ranges of at most BLOCK elements each."""
    step = max(1, BLOCK // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def in_float64(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix in float64, block by block, each with where it is: all in the memory of the first, as new
    memory for each takes longer than filling it. A float64 matrix gives its own rows."""
    blocks = row_blocks(*matrix.shape)
    if matrix.dtype == torch.float64:
        yield from ((rows, matrix[rows]) for rows in blocks)
        return
    height = blocks[0].stop if blocks else 0
    held = torch.empty(height, matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in blocks:
        yield rows, held[: rows.stop - rows.start].copy_(matrix[rows])


def workspace(m: int, n: int) -> int:
    """Peak bytes of `right_singular` and of what a rule does with it: the Gram, its eigenvectors in place, LAPACK's
    work (2n²), one more n², six blocks."""
    small = min(m, n)
    return 8 * (4 * small * small + 6 * min(BLOCK, m * n))


def _gram(columns: int, blocks: Iterator[Tensor], like: Tensor) -> Tensor:
    """Lower triangle (by panels) of Σ BᵀB over float64 blocks of rows; what is above the diagonal panels stays zero."""
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=like.device)
    panel = max(64, -(-columns // 4))  # in more and narrower ones products take longer than they save
    for block in blocks:
        for p in range(0, columns, panel):
            gram[p:, p : p + panel].addmm_(block[:, p:].mT, block[:, p : p + panel])
    return gram


def _eigh_descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clipped at 0) and eigenvectors of a symmetric matrix given by its lower triangle, largest first. Its
    memory is used, on a CPU for the vectors."""
    gram.neg_()  # LAPACK gives the smallest first
    if gram.is_cpu and gram.numel():
        # The memory read as columns holds the upper triangle; written as columns it receives the eigenvectors.
        vectors = gram.mT
        values = torch.empty(len(gram), dtype=torch.float64)
        torch.linalg.eigh(vectors, UPLO="U", out=(values, vectors))
    else:
        values, vectors = torch.linalg.eigh(gram)
    return values.neg_().clamp_(min=0), vectors


def right_singular(matrix: Tensor, need: float = 1.0) -> tuple[Tensor, Tensor]:
    """σ (n, descending, float64, exact zeros at or below NULL·σ₁) and V (n×n, float64) of an m×n matrix with m ≥ n, U
    not formed.

    From the float64 Gram: values and subspaces at a fraction f of σ₁ are right to about 1e-16/f². `need` is the
    smallest fraction of σ₁ that matters to the caller; if singular values between NULL and STEEP lie there, the Gram of
    what is left outside the steep directions is taken a second time.
    """
    n = matrix.shape[1]
    values, v = _eigh_descending(_gram(n, (block for _, block in in_float64(matrix)), matrix))
    sigma = values.sqrt()
    top = float(sigma[0])
    steep = int((sigma > STEEP * top).sum())
    if need < STEEP and steep < n and top > 0:
        rest = v[:, steep:]
        inner, w = _eigh_descending(_gram(n - steep, (block @ rest for _, block in in_float64(matrix)), matrix))
        sigma = torch.cat([sigma[:steep], inner.sqrt()])
        v = torch.cat([v[:, :steep], rest @ w], dim=1)
    return torch.where(sigma > NULL * top, sigma, 0.0), v


MILD = 2.0
"""Up to this a product in float32 that makes singular values equal is right to 5e-7."""


def mild(sigma: Tensor) -> bool:
    """Whether the product of a float32 matrix with V·diag(1/σ)·Vᵀ, of these singular values of its own, may be made in
    float32: what it is off by is 2.5e-7 times the mean σ times the mean 1/σ, as was measured."""
    return float(sigma.square().mean() * sigma.reciprocal().square().mean()) <= MILD**2


def through(matrix: Tensor, turned: Callable[[Tensor], Tensor], out: Tensor, *, single: bool) -> None:
    """Writes what `turned` makes of the rows of a float32 matrix, block by block; they are given in float64 unless
    `single`."""
    blocks = ((rows, matrix[rows]) for rows in row_blocks(*matrix.shape)) if single else in_float64(matrix)
    for rows, block in blocks:
        out[rows] = turned(block)


def together(sides: Sequence[int], first: Tensor, second: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies rows of an m×n matrix with n×r and r×n, these two first where that takes fewer products."""
    (m, n), r = sides, first.shape[1]
    if n * r + m * n < 2 * m * r:
        both = first @ second
        return lambda rows: rows @ both
    return lambda rows: rows @ first @ second


SPARE = 8
"""Directions that `span` looks at besides those that there are."""
MISSED = 1e-12
"""Share of ‖M‖² that may lie outside what `span` found: what rounding a matrix to float32 adds is far below."""


def span(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """L (m×k, orthonormal columns) and C = LᵀM (k×n), in float64, with M = L·C, k a few more than `rank`; None where M
    has more directions than these. `rank` is how many it is said to have.

    Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", algorithm 4.1: L spans M·Ω for a random Ω.
    """
    m, n = matrix.shape
    width = min(m, n, rank + SPARE)
    draw = torch.Generator().manual_seed(width)
    omega = torch.randn(n, width, generator=draw, dtype=torch.float64).to(matrix.device)
    left = torch.linalg.qr(torch.cat([block @ omega for _, block in in_float64(matrix)]))[0]
    core, whole_sq = torch.zeros(width, n, dtype=torch.float64, device=matrix.device), 0.0
    for rows, block in in_float64(matrix):
        core.addmm_(left[rows].mT, block)
        whole_sq += float(block.square().sum())
    return (left, core) if whole_sq - float(core.square().sum()) <= MISSED * whole_sq else None


def spans_cheaply(m: int, n: int, rank: int) -> bool:
    """Whether `span` and a decomposition of its core are worth it beside `right_singular`, and take no more memory."""
    width = rank + SPARE
    return 4 * width <= min(m, n) and 8 * 3 * (m + n) * width <= workspace(m, n)


def longest(matrices: Tensor) -> Tensor:
    """A bound from above on the largest singular value of an m×k float64 matrix, at most k^{1/8} times that; of each,
    where there are several (… × m × k)."""
    scale = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    unit = (matrices / torch.where(scale > 0, scale, 1.0)).float()
    gram = unit.mT @ unit
    bound = torch.linalg.vector_norm(gram @ gram, dim=(-2, -1)).double() ** 0.25
    found: Tensor = scale[..., 0, 0] * bound * (1.0 + 1e-5)
    return found


def longest_inverse(matrix: Tensor) -> float:
    """The same of the inverse of a square matrix; infinite where there is none. That of a triangle above the diagonal
    costs a third."""
    if bool(matrix.tril(-1).any()):
        inverse, failed = torch.linalg.inv_ex(matrix)
        return math.inf if int(failed) else float(longest(inverse))
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    found = float(longest(torch.linalg.solve_triangular(matrix, unit, upper=True)))
    return found if math.isfinite(found) else math.inf


def gram(rows: Tensor) -> Tensor:
    """The inner products of K vectors, K×K float64: each pair once, by panels; without a float64 copy of them."""
    found = _gram(len(rows), _doubled(rows), rows).tril_()
    return found + found.tril(-1).mT


def _doubled(rows: Tensor) -> Iterator[Tensor]:
    """The columns of a matrix of vectors, a few at a time, as rows of float64: all in the memory of the first, as new
    memory for each takes longer than filling it."""
    if rows.dtype == torch.float64:
        yield rows.mT
        return
    parts = row_blocks(rows.shape[1], 4 * len(rows))
    held = torch.empty(len(rows), parts[0].stop if parts else 0, dtype=torch.float64, device=rows.device)
    for part in parts:
        yield held[:, : part.stop - part.start].copy_(rows[:, part]).mT


def _twice(rows: Tensor, v: Tensor) -> Tensor:
    """MᵀM·v. Where the rows lie in memory one after the other a block of them is read once for both products."""
    if not rows.is_cpu or not rows.is_contiguous():
        return rows.mT @ (rows @ v)
    found = torch.zeros_like(v)
    step = max(1, CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        found.addmm_(block.mT, block @ v)
    return found


def top(matrix: Tensor) -> float:
    """The largest singular value of an m×n matrix, from below: three steps of a block power iteration from a fixed
    start, in float32.

    Measured: within 4e-4 on real task vectors of a 22M encoder; within 6 % on Gaussian noise, whose singular values
    crowd at the top. A figure to choose lengths by, not to compute with. It costs seven passes over the matrix.
    """
    largest = max(map(abs, map(float, torch.aminmax(matrix)))) if matrix.numel() else 0.0
    if not largest or not math.isfinite(largest):
        return largest
    rows = tall(matrix)
    width = min(16, rows.shape[1])
    places = torch.arange(rows.shape[1] * width, dtype=torch.float64)
    start = ((places + 1) * 0.6180339887498949).frac().view(
        -1, width
    ) - 0.5  # as good as random, and the same everywhere
    v = torch.linalg.qr(start.to(matrix.device, torch.float32))[0]
    for _ in range(3):
        v = torch.linalg.qr(_twice(rows, v / largest) / largest)[0]
    ahead = (rows @ (v / largest)).double()
    return largest * math.sqrt(float(torch.linalg.eigvalsh(ahead.mT @ ahead)[-1]))
