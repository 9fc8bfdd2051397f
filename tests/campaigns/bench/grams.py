"""What float32 costs in the sums of `gram` and `flow`: how far what is read moves, relative to the largest task vector,
against sums in float64.

    python -m tests.campaigns.bench.grams

Task vectors of four kinds: noise; a spectrum that falls as 1/i; products of rank 16, each with factors of its own; and
such that share one factor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from continual.rules import flow, gram
from continual.rules.gram_sums import CROSS, LEFT, RIGHT

KEPT = {"A, A' and B": (torch.float32, torch.float32), "B": (torch.float64, torch.float32)}
KEPT |= {"A and A'": (torch.float32, torch.float64)}
READS = ("ridge 0.1", "ridge 0.01", "ridge 0.001", "time 10", "time 1000")


def kinds(m: int, n: int, count: int) -> Iterator[tuple[str, list[Tensor]]]:
    """`count` task vectors of every kind."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    p, shared = min(m, n), draw(16, n)
    falling = 1.0 / torch.arange(1, p + 1)
    yield "noise", [draw(m, n) for _ in range(count)]
    yield (
        "falling",
        [(torch.linalg.qr(draw(m, p))[0] * falling) @ torch.linalg.qr(draw(n, p))[0].mT for _ in range(count)],
    )
    yield "rank 16", [draw(m, 16) @ draw(16, n) for _ in range(count)]
    yield "shared factor", [draw(m, 16) @ shared for _ in range(count)]


def summed(taus: list[Tensor], grams: torch.dtype, cross: torch.dtype) -> dict[str, Tensor]:
    """The sums, each rounded to its dtype after every addition; float64."""
    m, n = taus[0].shape
    kept = {CROSS: torch.zeros(m, n, dtype=cross)}
    kept |= {side: torch.zeros(k, k, dtype=grams) for side, k in ((RIGHT, n), (LEFT, m))}
    for tau in taus:
        exact = tau.double()
        unit = exact / exact.norm()
        terms = {RIGHT: unit.mT @ unit, LEFT: unit @ unit.mT, CROSS: unit @ (unit.mT @ exact)}
        kept = {slot: (value.double() + terms[slot]).to(value.dtype) for slot, value in kept.items()}
    return {slot: value.double() for slot, value in kept.items()}


def reads(kept: dict[str, Tensor]) -> list[Tensor]:
    """What is read of the sums, in every way."""
    solved = [gram.solve(kept, ridge, 0.0) for ridge in (0.1, 0.01, 0.001)]
    return solved + [flow.flowed(kept, flow.FlowOptions(time=time)) for time in (10.0, 1000.0)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("| m × n | models | kind | in float32 |", " | ".join(READS), "|")
    print("|---" * (4 + len(READS)) + "|")
    for m, n, count in ((384, 384, 8), (1024, 512, 20)):
        for name, taus in kinds(m, n, count):
            exact, largest = reads(summed(taus, torch.float64, torch.float64)), max(float(tau.norm()) for tau in taus)
            for what, dtypes in KEPT.items():
                pairs = zip(reads(summed(taus, *dtypes)), exact, strict=True)
                moved = [float((one - other).norm()) / max(largest, float(other.norm())) for one, other in pairs]
                print(f"| {m} × {n} | {count} | {name} | {what} |", " | ".join(f"{x:.1e}" for x in moved), "|")


if __name__ == "__main__":
    main()
