"""Speed of a fold, as ratios within one run.

    python -m tests.campaigns.bench.fold

The OPCM step against a plain implementation with a full float32 SVD, and both against the float64 truth; then the CPU
of a durable `mean` fold against a synced copy of the same bytes: what the fold must read (base, fine-tune, state) is
read, what it must write (state) is written and fsynced; then that of `ties` against `task-arithmetic`, and of stacks of
experts against the same experts in tensors of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from tests.campaigns.bench import opcm_step
from tests.helpers import models


def cpu() -> float:
    """CPU seconds of this process so far, all threads."""
    used = os.times()
    return used.user + used.system


def synced_copy(reads: list[Path], write: Path, nbytes: int) -> None:
    """Reads all of `reads` and writes `nbytes` into files of at most 32 MiB under `write`, each synced."""
    buffer = bytearray(32 << 20)
    for path in reads:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    write.mkdir()
    left, number = nbytes, 0
    while left:
        part = min(left, len(buffer))
        with open(write / str(number), "wb", buffering=0) as file:
            file.write(memoryview(buffer)[:part])
            os.fsync(file.fileno())
        left, number = left - part, number + 1


def settle_memory(scratch: Path, nbytes: int) -> None:
    """Writes and deletes a file, so that what is timed next finds free memory that the machine has already given this
    system.

    In a virtual machine the first use of a page costs the host's fault as well; whoever came second would be spared it.
    """
    synced_copy([], scratch, nbytes)
    shutil.rmtree(scratch)


def mean_against_copy(repeats: int) -> None:
    """CPU of folds two and later against copies of the same bytes, alternating."""
    from continual import api, making
    from continual.config import Settings

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = models.base(work / "base", shapes=models.big_shapes(0.4, layers=24))
        making.init(base, work / "state", making.Recipe(rule="mean"))
        folds, copies = [], []
        with api.Merge(Settings(state=work / "state", keep=1), write=True) as merge:
            for number in range(repeats + 1):
                model = models.fine_tune(base, work / f"fine-tune-{number}", number)
                size = merge.state.format.generation_bytes
                settle_memory(work / "scratch", 2 * size)
                began = cpu()
                merge.fold(model)
                folded = cpu() - began
                generation = work / "state" / "generations" / str(merge.state.ledger.head.generation)
                reads = [
                    base / "model.safetensors",
                    model / "model.safetensors",
                    *(p for p in generation.rglob("*") if p.is_file()),
                ]
                settle_memory(work / "scratch", 2 * size)
                began = cpu()
                synced_copy(reads, work / "copy", size)
                copied = cpu() - began
                shutil.rmtree(work / "copy")
                shutil.rmtree(model)
                if number:
                    folds.append(folded)
                    copies.append(copied)
        ratio = statistics.median(f / c for f, c in zip(folds, copies, strict=True))
        print(
            f"durable mean fold of a {size / 1e9:.2f} GB float32 model, {repeats} times after the first, "
            "CPU seconds (median, least):"
        )
        print(
            f"  fold {statistics.median(folds):.2f}, {min(folds):.2f}; synced copy "
            f"{statistics.median(copies):.2f}, {min(copies):.2f};"
            f" ratio {ratio:.2f}, of the least {min(folds) / min(copies):.2f}"
        )


def ties_against_sum(repeats: int) -> None:
    """CPU of a fold with `ties` (trimmed over the whole model) against one with `task-arithmetic`, the same models,
    alternating."""
    from continual import api, making
    from continual.config import Settings

    spent: dict[str, list[float]] = {"task-arithmetic": [], "ties": []}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = models.base(work / "base", shapes=models.big_shapes(0.2, layers=12))
        for rule in spent:
            making.init(base, work / rule, making.Recipe(rule=rule))
        for number in range(repeats + 1):
            model = models.fine_tune(base, work / f"fine-tune-{number}", number)
            for rule, seconds in spent.items():
                with api.Merge(Settings(state=work / rule, keep=1), write=True) as merge:
                    settle_memory(work / "scratch", 2 * merge.state.format.generation_bytes)
                    began = cpu()
                    merge.fold(model)
                    if number:
                        seconds.append(cpu() - began)
            shutil.rmtree(model)
    ratio = statistics.median(t / s for t, s in zip(spent["ties"], spent["task-arithmetic"], strict=True))
    figures = ", ".join(f"{rule} {statistics.median(seconds):.2f}" for rule, seconds in spent.items())
    print(f"fold of a float32 model, {repeats} times after the first, CPU seconds: {figures}; ratio {ratio:.2f}")


def stack_against_matrices(repeats: int, rules: tuple[str, ...] = ("opcm", "tsv-m", "mean")) -> None:
    """CPU of a fold of packed experts against one of the same experts in tensors of their own, alternating."""
    from continual import api, making
    from continual.config import Settings

    experts, rows, columns, layers = 16, 384, 256, 4
    heads = [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    shapes = {
        "packed": {f"{head}.down_proj": (experts, rows, columns) for head in heads},
        "apart": {f"{head}.{number}.down_proj.weight": (rows, columns) for head in heads for number in range(experts)},
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        bases = {which: models.base(work / which, shapes=made) for which, made in shapes.items()}
        tunes = {
            which: [models.fine_tune(base, work / f"{which}-{n}", n) for n in range(repeats + 1)]
            for which, base in bases.items()
        }
        for rule in rules:
            spent: dict[str, list[float]] = {which: [] for which in shapes}
            for which, base in bases.items():
                making.init(base, work / f"{rule}-{which}", making.Recipe(rule=rule))
            for number in range(repeats + 1):
                for which, seconds in spent.items():
                    with api.Merge(Settings(state=work / f"{rule}-{which}", keep=1), write=True) as merge:
                        began = cpu()
                        found = merge.fold(tunes[which][number])
                        assert found.fate == "folded", found.message
                        if number:
                            seconds.append(cpu() - began)
            ratio = statistics.median(a / b for a, b in zip(spent["packed"], spent["apart"], strict=True))
            figures = ", ".join(f"{which} {statistics.median(seconds):.2f}" for which, seconds in spent.items())
            print(f"{rule}: {layers} stacks of {experts} experts {rows}x{columns}, CPU s: {figures}; ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    opcm_step.main()
    mean_against_copy(args.repeats)
    ties_against_sum(args.repeats)
    stack_against_matrices(args.repeats)


if __name__ == "__main__":
    main()
