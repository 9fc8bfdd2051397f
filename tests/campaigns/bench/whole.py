"""What the width of a state of adapters takes of a full-rank task vector (DoRA's), and what its triplets cost.

    python -m tests.campaigns.bench.whole --side 2048

The base's singular values fall as k to a power; the lengths of its rows change by 2 %, beside factors of rank 8. For
each power and width: the share of ‖τ‖² that is cut off, the least possible (by an SVD of everything), and CPU seconds.
"""

from __future__ import annotations

import argparse
import time

import torch

from continual.blocks import decomposed

WIDTHS = (64, 256)
POWERS = (0.3, 0.5, 0.75, 1.0)
LENGTHS = 0.02


def task_vector(side: int, power: float) -> torch.Tensor:
    """diag(c)·(W + B·A) − W."""
    random = torch.Generator().manual_seed(side)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=random))[0] for _ in range(2))
    sigma = torch.arange(1, side + 1) ** -power
    base = (left * sigma) @ right.mT
    down, up = torch.randn(8, side, generator=random), torch.randn(side, 8, generator=random)
    added = up @ down * (0.01 * float(sigma.norm()) / side)
    lengths = 1.0 + LENGTHS * torch.randn(side, 1, generator=random)
    return lengths * (base + added) - base


def main() -> None:
    """Prints a line for each power and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048)
    side = parser.parse_args().side
    print("power  width     cut   least  CPU s  CPU s of an SVD")
    for power in POWERS:
        tau = task_vector(side, power)
        began = time.process_time()
        squares = torch.linalg.svdvals(tau).double().square()
        whole = time.process_time() - began
        for width in WIDTHS:
            began = time.process_time()
            found = decomposed(tau, width)
            took = time.process_time() - began
            cut, least = 1 - found.kept / found.energy, 1 - float(squares[:width].sum() / squares.sum())
            print(f"{power:5.2f}  {width:5d}  {cut:6.2%}  {least:6.2%}  {took:5.2f}  {whole:5.2f}")


if __name__ == "__main__":
    main()
