"""The polar factor that `iso-c` and `tsv-m` read with, against one that takes products of matrices only.

    python -m tests.campaigns.bench.polar

For each shape: CPU seconds (the least of three) and the relative error against a float64 singular value decomposition,
of our Gram and eigh, of Newton-Schulz in float64 (X ← 1.5·X − 0.5·X·XᵀX until it stands still), and of a float32
singular value decomposition.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from continual.rules import iso_c

SHAPES = ((384, 384), (768, 768), (1536, 384), (3072, 768))
CONDITION = 1e3


def newton_schulz(matrix: Tensor) -> Tensor:
    """The polar factor of an m×n matrix of full rank, m ≥ n; float64."""
    x = matrix.double()
    x = x / torch.linalg.matrix_norm(x)
    for _ in range(100):
        step = 0.5 * (x - x @ (x.mT @ x))
        x = x + step
        if float(step.norm()) < 1e-12 * float(x.norm()):
            break
    return x


def decomposed(matrix: Tensor) -> Tensor:
    """The same by a singular value decomposition in the matrix's dtype."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def measured(work: Callable[[Tensor], Tensor], matrix: Tensor, expected: Tensor) -> str:
    """CPU seconds and error, in a cell; both are made as long as each other first, for what `iso-c` reads is scaled."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        found = work(matrix)
        seconds.append(time.process_time() - started)
    found = found.double() * (expected.norm() / found.double().norm())
    return f"{min(seconds):.3f} s, {float((found - expected).norm() / expected.norm()):.1e}"


def main() -> None:
    random = torch.Generator().manual_seed(0)
    table = Table(
        "shape",
        "Gram and eigh (ours)",
        "Newton-Schulz",
        "float32 SVD",
        title=f"CPU seconds, error; condition {CONDITION:g}",
    )
    for m, n in SHAPES:
        left = torch.linalg.qr(torch.randn(m, n, generator=random, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))[0]
        sigma = torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), n, dtype=torch.float64)
        matrix = (left @ torch.diag(sigma) @ right).float()
        expected = decomposed(matrix.double())
        table.add_row(
            f"{m}x{n}", *(measured(work, matrix, expected) for work in (iso_c.flat, newton_schulz, decomposed))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
