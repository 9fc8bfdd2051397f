"""What one run of a `task-arithmetic` fold costs, from two bf16 values to the sum, in each of the ways to write it.

    python -m tests.campaigns.bench.one_pass [--repeats 5]

A run of 2^18 elements that is in the cache, as a fold has it: both bf16 values become float32, are subtracted, ‖τ‖²,
⟨τ, X⟩ and ‖X + τ‖² are summed, and τ is added to X. `now` is what a fold calls; the others are one loop in C, by gcc
with several flags, the same loop by numba, and the same formulas by torch.compile, each where it is installed. CPU
seconds per GB of bf16, medians of the turns, which the ways take one after the other; the first call, and with it what
compiling or loading takes, is apart.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from continual import linalg
from continual.tensors.vectors.vectors import RUN

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Iterable[float]]
"""X += a − b in place, of flat bf16 a and b and float32 X; returns the sums."""
SOURCE = """
#include <stdint.h>
#include <string.h>
static inline float wide(uint16_t bits) { uint32_t u = (uint32_t)bits << 16; float r; memcpy(&r, &u, 4); return r; }
void one_pass(const uint16_t *restrict a, const uint16_t *restrict b, float *restrict x, long n, double *restrict out) {
  double tau_sq = 0, dot = 0, after_sq = 0;
  for (long row = 0; row < n; row += 1024) {
    float p[16] = {0}, q[16] = {0}, r[16] = {0};
    for (long i = row; i < row + 1024; i += 16)
      for (int k = 0; k < 16; k++) {
        float tau = wide(a[i + k]) - wide(b[i + k]), before = x[i + k], after = before + tau;
        p[k] += tau * tau; q[k] += tau * before; r[k] += after * after; x[i + k] = after;
      }
    float ps = 0, qs = 0, rs = 0;
    for (int k = 0; k < 16; k++) { ps += p[k]; qs += q[k]; rs += r[k]; }
    tau_sq += ps; dot += qs; after_sq += rs;
  }
  out[0] = tau_sq; out[1] = dot; out[2] = after_sq;
}
"""
FLAGS = (("-O2",), ("-O3",), ("-O3", "-march=x86-64-v3"), ("-O3", "-march=native"))
_TAU = torch.empty(RUN)


def now(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> Iterable[float]:
    _TAU.copy_(a).sub_(b)
    return linalg.add(x, _TAU, 1.0)


def in_c(flags: tuple[str, ...], work: Path) -> Way:
    """The loop by gcc."""
    source, made = work / "pass.c", work / f"{'_'.join(flags)}.so"
    source.write_text(SOURCE)
    subprocess.run(["gcc", *flags, "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    call, out = ctypes.CDLL(str(made)).one_pass, np.empty(3)
    pointer = ctypes.c_void_p

    def way(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> Iterable[float]:
        places = (pointer(each.data_ptr()) for each in (a, b, x))
        call(*places, ctypes.c_long(len(x)), pointer(out.ctypes.data))
        return out

    return way


def in_numba() -> Way:
    """The loop by numba, which has no bf16: the bits are widened into memory that is read as float32, 2^14 elements at
    a time."""
    numba = importlib.import_module("numba")
    bits = np.empty((2, 1 << 14), np.uint32)
    values = bits.view(np.float32)

    def widen(narrow, into):  # type: ignore[no-untyped-def]  # numba infers
        for i in range(len(narrow)):
            into[i] = np.uint32(narrow[i]) << np.uint32(16)

    def loop(left, right, x):  # type: ignore[no-untyped-def]
        tau_sq, dot, after_sq = 0.0, 0.0, 0.0
        for row in range(0, len(x), 1024):
            p = q = r = np.float32(0)
            for i in range(row, row + 1024):
                tau = left[i] - right[i]
                before = x[i]
                after = before + tau
                p += tau * tau
                q += tau * before
                r += after * after
                x[i] = after
            tau_sq, dot, after_sq = tau_sq + p, dot + q, after_sq + r
        return tau_sq, dot, after_sq

    wide, made = numba.njit(widen), numba.njit(loop, fastmath=True)

    def way(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> Iterable[float]:
        sums, step = np.zeros(3), bits.shape[1]
        ours, theirs, total = a.view(torch.uint16).numpy(), b.view(torch.uint16).numpy(), x.numpy()
        for start in range(0, len(total), step):
            wide(ours[start : start + step], bits[0])
            wide(theirs[start : start + step], bits[1])
            sums += made(values[0], values[1], total[start : start + step])
        return sums.tolist()

    return way


def by_torch() -> Way:
    """The formulas by torch.compile."""

    def formulas(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        tau = a.float() - b.float()
        after = x + tau
        rows = torch.stack([(each.view(-1, 1024)).sum(1) for each in (tau * tau, tau * x, after * after)])
        x.copy_(after)
        return rows.double().sum(1)

    way: Way = torch.compile(formulas)
    return way


def ways(work: Path) -> dict[str, Callable[[], Way]]:
    """How to make each of the ways that can be had here."""
    found: dict[str, Callable[[], Way]] = {"now": lambda: now}
    if shutil.which("gcc"):
        found |= {f"C, gcc {' '.join(flags)}": partial(in_c, flags, work) for flags in FLAGS}
    if importlib.util.find_spec("numba"):
        found["numba"] = in_numba
    if shutil.which("g++"):
        found["torch.compile"] = by_torch
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(RUN, generator=draw) * 0.1).bfloat16() for _ in range(2))
    start = torch.randn(RUN, generator=draw) * 0.01
    truth = linalg.add(start.clone(), a.float() - b.float(), 1.0)
    calls = 256
    seconds: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        made = {}
        for name, make in ways(Path(temporary)).items():
            began, x = time.perf_counter(), start.clone()
            made[name] = make()
            found = torch.tensor([float(each) for each in made[name](a, b, x)], dtype=torch.float64)
            first[name] = time.perf_counter() - began
            assert torch.allclose(found, torch.tensor(truth, dtype=torch.float64), rtol=1e-5), (name, found, truth)
        for _ in range(args.repeats):
            for name, way in made.items():
                x = start.clone()
                began = time.process_time()
                for _ in range(calls):
                    way(a, b, x)
                per_gb = (time.process_time() - began) / (2e-9 * calls * RUN)
                seconds.setdefault(name, []).append(per_gb)
    print("CPU seconds per GB of bf16; seconds of the first call, with compiling and loading")
    for name, found_seconds in seconds.items():
        print(f"  {name:<32} {statistics.median(found_seconds):5.2f}  {first[name]:6.2f}")


if __name__ == "__main__":
    main()
