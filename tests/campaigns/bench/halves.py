"""Whether sums of task vectors could be kept in two bytes a parameter: what rounding them after every fold adds.

    python -m tests.campaigns.bench.halves [--side 512] [--folds 1000] [--length 0.01]

Fine-tunes of one bf16 matrix: a base of Gaussian values and task vectors whose singular values fall as 1/k, a tenth of
each in directions that all share, `--length` of the base's norm, rounded to bfloat16 as published ones are. They are
added up in float64 and in each form, which rounds the sum after every fold. Then, at 1, 10, 100 and 1,000 folds:

- `sum`: how far the kept sum is from the true one, relative to its length;
- `export`: the error of the exported matrix, base + X·‖τ‖/‖X‖ rounded to bfloat16, against the one before rounding,
  as a multiple of what the rounding of the export alone makes of the true sum: 1 is nothing added. One model alone is
  exported as itself, so that this is next to nothing at one fold;
- `iso-c`: how far the polar factor of X is from that of the true sum, relative to its length; beside it (`published`)
  how far the one of the fine-tunes before they were rounded is;
- `taken out`: what is left of the first model's task vector where all the others were subtracted again, relative to
  what it should be.

Last, CPU seconds per GB of a bf16 model for the rounding itself, beside a check and a copy of the bytes that are saved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import google_crc32c
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
BLOCK = 1024
MARKS = (1, 10, 100, 1000)


def bfloat(values: Floats, draw: np.random.Generator | None) -> Floats:
    """Rounded to bfloat16, to the nearest even, or up as often as the rest says."""
    bits = values.view(np.uint32)
    if draw is None:
        added = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    else:
        added = draw.integers(0, 1 << 16, bits.shape, np.uint16).astype(np.uint32)
    return ((bits + added) & np.uint32(0xFFFF0000)).view(np.float32)


def fixed(values: Floats, draw: np.random.Generator | None) -> Floats:
    """Rounded to 65,535 steps between the largest values of each block of 1,024."""
    blocks = values.reshape(-1, BLOCK)
    unit = np.abs(blocks).max(1, keepdims=True) / np.float32(32767)
    steps = blocks / np.where(unit > 0, unit, np.float32(1))
    whole = np.rint(steps) if draw is None else np.floor(steps + draw.random(steps.shape, np.float32))
    kept = np.clip(whole, -32767, 32767).astype(np.int16)
    return np.asarray(kept * unit, np.float32).reshape(values.shape)


FORMS: Mapping[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "float32": lambda values, _: values,
    "bfloat16, nearest": lambda values, _: bfloat(values, None),
    "bfloat16, stochastic": bfloat,
    "int16 a block, nearest": lambda values, _: fixed(values, None),
    "int16 a block, stochastic": fixed,
}


def distance(found: Doubles | Floats, true: Doubles) -> float:
    """Relative to the true one's length."""
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def polar(matrix: Doubles | Floats) -> Doubles:
    """UVᵀ."""
    left, _, right = np.linalg.svd(matrix.astype(np.float64))
    return np.asarray(left @ right)


class Tunes:
    """Fine-tunes of one matrix, drawn one after the other."""

    def __init__(self, side: int, length: float) -> None:
        self._draw = np.random.default_rng(0)
        self.base = bfloat(self._draw.standard_normal((side, side), np.float32) * np.float32(0.02), None)
        self._falls = np.arange(1, side + 1, dtype=np.float32) ** -1
        self._shared, self._length = self._directions(), length

    def _directions(self) -> Floats:
        side = len(self.base)
        left, right = (self._draw.standard_normal((side, side), np.float32) for _ in "lr")
        found = (left * self._falls) @ right
        return np.asarray(found / np.linalg.norm(found))

    def next(self) -> tuple[Floats, Floats]:
        """A task vector as it is published, and before it was rounded."""
        own = self._directions() + np.float32(0.1**0.5) * self._shared
        tau = own * np.float32(self._length * np.linalg.norm(self.base) / np.linalg.norm(own))
        return bfloat(self.base + tau, None) - self.base, tau


def study(side: int, folds: int, length: float) -> None:
    """Prints a line for each form and mark."""
    tunes, draw = Tunes(side, length), np.random.default_rng(1)
    true, smooth = np.zeros((2, side, side))
    kept = {form: np.zeros((side, side), np.float32) for form in FORMS}
    taus: list[Floats] = []
    print(f"{side} × {side}, ‖τ‖ = {length:g} of the base's")
    print("| folds | form | sum | export | iso-c | published | taken out |\n|" + "---|" * 7)
    for number in range(1, folds + 1):
        tau, before = tunes.next()
        true += tau
        smooth += before
        if number <= 100:
            taus.append(tau)
        for form, rounded in FORMS.items():
            kept[form] = rounded(kept[form] + tau, draw)
        if number in MARKS:
            own, published = polar(true), ""
            if number <= 100:
                published = f"{distance(polar(smooth), own):.1e}"
            scale = np.linalg.norm(tau) / np.linalg.norm(true)
            merged = tunes.base + scale * true
            floor = np.linalg.norm(bfloat(merged.astype(np.float32), None) - merged)
            for form, found in kept.items():
                out = bfloat((tunes.base + scale * found.astype(np.float64)).astype(np.float32), None)
                added = float(np.linalg.norm(out - merged) / floor)
                left = ""
                if 1 < number <= 100:
                    rest = found
                    for other in taus[1:]:
                        rest = FORMS[form](rest - other, draw)
                    left = f"{distance(rest, taus[0].astype(np.float64)):.1e}"
                print(
                    f"| {number} | {form} | {distance(found, true):.1e} | {added:.4f} | "
                    f"{distance(polar(found), own):.1e} | {published} | {left} |",
                    flush=True,
                )


def costs(repeats: int = 5) -> None:
    """Prints what the rounding takes, and what it saves."""
    values = np.random.default_rng(2).standard_normal(1 << 24, np.float32)
    draw, bytes_ = np.random.default_rng(3), np.zeros(1 << 25, np.uint8)
    target = np.empty_like(bytes_)

    def saved() -> None:
        for part in np.split(bytes_, 32):
            google_crc32c.extend(0, part)
            google_crc32c.extend(0, part)
        np.copyto(target, bytes_)
        np.copyto(bytes_, target)

    def measured(work: Callable[[], object]) -> float:
        found = []
        for _ in range(repeats):
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
        return sorted(found)[repeats // 2] * 0.5e9 / len(values)

    def rounding(form: str) -> Callable[[], object]:
        def all_of_it() -> None:
            for start in range(0, len(values), 1 << 16):
                FORMS[form](values[start : start + (1 << 16)], draw)

        return all_of_it

    print("CPU s per GB of a bf16 model:")
    print(f"  two bytes less to check twice, read and write: {measured(saved):.2f}, the kernel's part apart")
    for form in list(FORMS)[1:]:
        print(f"  {form}: {measured(rounding(form)):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--folds", type=int, default=1000)
    parser.add_argument("--length", type=float, nargs="+", default=[0.01, 0.001])
    args = parser.parse_args()
    for length in args.length:
        study(args.side, args.folds, length)
    costs()


if __name__ == "__main__":
    main()
