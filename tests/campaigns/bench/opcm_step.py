"""Speed and accuracy of one OPCM step against a plain one, as ratios within one run.

    python -m tests.campaigns.bench.opcm_step [--threads 1 2]

The plain step is what the released code does, in float32: a full singular value decomposition of the merged task vector
(U m×m, V n×n), P = UᵀτV, its top-left block zeroed, C = UPVᵀ. `thin` is the leanest plain step: an SVD with p columns
and the block alone. Error: Frobenius distance of C from the float64 truth by a full SVD, relative to C. Ours includes
adding C to the accumulator and all sums and notes; the plain ones stop at C.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from continual.records import TensorSpec, Totals
from continual.rules import Inputs, rule
from tests.helpers import reference

SHAPES = ((768, 3072), (3072, 768), (768, 768), (2048, 2048))
ALPHA = 0.5


def crossing(sigma: Tensor) -> int:
    """First k with cumsum(σ)_k / Σσ > α."""
    return int((sigma.cumsum(0) / sigma.sum() <= ALPHA).sum())


def plain(total: Tensor, tau: Tensor) -> Tensor:
    """C by a full SVD in the dtype of its inputs, as released."""
    u, sigma, vh = torch.linalg.svd(total, full_matrices=True)
    r = crossing(sigma)
    p = u.mT @ tau @ vh.mT
    p[:r, :r] = 0
    return u @ p @ vh


def thin(total: Tensor, tau: Tensor) -> Tensor:
    """C by a thin SVD and the protected block only."""
    u, sigma, vh = torch.linalg.svd(total, full_matrices=False)
    r = crossing(sigma)
    u, vh = u[:, :r], vh[:r]
    return tau - u @ (u.mT @ tau @ vh.mT) @ vh


def pair(m: int, n: int, decay: float) -> tuple[Tensor, Tensor]:
    """R and τ like those of fine-tunes: random directions, singular values that fall as k^−decay (0 leaves a Gaussian
    matrix's own)."""
    generator = torch.Generator().manual_seed(m * 10007 + n)
    made = []
    for _ in range(2):
        value = torch.randn(m, n, generator=generator) * 1e-3
        if decay:
            side = min(m, n)
            q, _ = torch.linalg.qr(torch.randn(side, side, generator=generator))
            scale = q * torch.arange(1, side + 1) ** -decay @ q.mT
            value = scale @ value if m <= n else value @ scale
        made.append(value)
    return made[0], made[1]


def best(step: Callable[[Tensor, Tensor], Tensor], total: Tensor, tau: Tensor, repeats: int) -> tuple[float, Tensor]:
    """Shortest time of `repeats` after a first, and C; inputs are copied outside the clock. Of one thread it is CPU
    time, so that others at work on the machine count for little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds, result = float("inf"), tau
    for number in range(repeats + 1):
        a, b = total.clone(), tau.clone()
        began = clock()
        result = step(a, b)
        if number:
            seconds = min(seconds, clock() - began)
    return seconds, result


def ours(total: Tensor, tau: Tensor) -> Tensor:
    """The rule itself; τ is C when it is done."""
    spec = TensorSpec("weight", tuple(tau.shape), "F32", "matrix")
    rule("opcm", {"alpha": ALPHA}).fold.apply({"sum": total}, tau, Inputs(spec), Totals())
    return tau


def main(threads: tuple[int, ...] = (2,)) -> None:
    """Prints one line a shape, spectrum and number of threads."""
    before = torch.get_num_threads()
    print(f"OPCM step, alpha {ALPHA}, milliseconds (best of several) and relative error of C against float64:")
    for count in threads:
        torch.set_num_threads(count)
        for m, n in SHAPES:
            for decay in (0.0, 0.5):
                total, tau = pair(m, n, decay)
                truth, r = reference.project(total.double(), tau.double(), ALPHA, "block")
                repeats = 1 if m * n > 4_000_000 else 3
                rows = {step.__name__: best(step, total, tau, repeats) for step in (ours, plain, thin)}
                seconds = {name: row[0] for name, row in rows.items()}
                errors = {name: float((row[1].double() - truth).norm() / truth.norm()) for name, row in rows.items()}
                print(
                    f"  {m:>4}×{n:<4} threads {count} decay {decay} r {r:>3}: ours "
                    f"{seconds['ours'] * 1e3:6.0f} ms {errors['ours']:.1e}"
                    f" | plain {seconds['plain'] * 1e3:6.0f} ms {errors['plain']:.1e}, "
                    f"{seconds['plain'] / seconds['ours']:5.2f}×"
                    f" | thin {seconds['thin'] * 1e3:6.0f} ms {errors['thin']:.1e}, "
                    f"{seconds['thin'] / seconds['ours']:5.2f}×",
                    flush=True,
                )
    torch.set_num_threads(before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    main(tuple(parser.parse_args().threads))
