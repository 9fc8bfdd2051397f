"""The same work on CUDA and on the cores of the CPU: whether the numbers agree, and how long each takes.

    python -m tests.campaigns.bench.cuda                    # all of it, within ten minutes; 15 GB of disk for a while
    python -m tests.campaigns.bench.cuda --layers 1 --width 256 --device cpu    # try it on a machine without CUDA
    python -m tests.campaigns.bench.cuda --width 256 --commands tsv-m adapters  # some of the commands

First every rule folds three fine-tunes of four matrices and a bias on both, and reads them: how far the merged task
vectors are apart, relative to their length, which has to stay below TOLERANCE. Then whole commands at the shapes of a
model of 8 B, `--layers` of its 32: the second fold of a fine-tune, of an adapter into a state of adapters, and the
export, each in a process of its own, with the threads that the settings give it. Exits with 1 where numbers differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from continual.blocks import decomposed, triplets
from continual.executors.device import pick_device
from continual.records import TensorSpec, Totals
from continual.rules import RULES, Inputs, Rule, Sums, rule, settle
from tests.campaigns.bench import adapters
from tests.campaigns.bench.memory import peak
from tests.helpers import models

Model = Mapping[str, torch.Tensor]
TOLERANCE = 1e-4
"""Of the merged task vectors of both devices: their float32 products add up in another order, and a polar factor moves
by that rounding over the smallest singular value that it keeps."""
GATES = ["noise.act=off"]
"""Fine-tunes of this size made of random numbers stand out less than trained ones."""
COMMANDS = ("task-arithmetic", "iso-c", "tsv-m", "opcm", "adapters")
"""Rules of states of whole tensors, and a state of adapters."""


def fine_tunes(width: int, count: int) -> list[Model]:
    """Task vectors whose singular values fall as those of real ones do, about as 1/k."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "square": (width, width),
        "tall": (4 * width, width),
        "wide": (width, 4 * width),
        "keys": (width // 4, width),
    }
    found = []
    for _ in range(count):
        model = {"bias": 0.01 * torch.randn(width, generator=random)}
        for name, (m, n) in shapes.items():
            k = min(m, n)
            left, right = (torch.linalg.qr(torch.randn(side, k, generator=random))[0] for side in (m, n))
            model[name] = (left / torch.arange(1, k + 1)) @ right.mT
        found.append(model)
    return found


def merged(one: Rule, given: list[Model], device: torch.device) -> tuple[Model, float, float]:
    """X of each tensor, made on `device`, and the seconds that folding and reading took."""
    specs = {
        n: TensorSpec(n, tuple(t.shape), "F32", "matrix" if t.dim() == 2 else "plain") for n, t in given[0].items()
    }
    totals = Totals()
    kept = {
        n: {
            slot: torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device=device)
            for slot, s in one.slots(spec).items()
        }
        for n, spec in specs.items()
    }
    on_device = [{n: tau.to(device) for n, tau in model.items()} for model in given]
    began = _now(device)
    for model in on_device:
        sums = []
        for n, tau in model.items():
            moments = tau.abs() if one.needs.shipped else None
            folded = one.fold.apply(kept[n], tau.clone(), Inputs(specs[n], 1.0, 7, None, moments=moments), totals)
            kept[n] = dict(folded.accumulators)
            sums.append(folded.sums)
        totals = settle(totals, Sums.total(sums), 1.0)
    folded_at = _now(device)
    found = {n: one.read.unit(spec, kept[n], totals) for n, spec in specs.items()}
    return {n: x.cpu() for n, x in found.items()}, folded_at - began, _now(device) - folded_at


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parity(width: int, device: torch.device) -> list[str]:
    """Prints both devices beside each other, rule by rule; the rules whose numbers differ."""
    given, differ = fine_tunes(width, 3), []
    print(f"three fine-tunes of four matrices of {width} and {4 * width}, seconds on the CPU and on {device}")
    for name in RULES:
        one = rule(name)
        if one.needs.measure is not None:  # has a pass over the whole model before, which is counted on the CPU
            continue
        merged(one, [{n: tau[:8] for n, tau in model.items()} for model in given[:2]], device)  # loads the kernels
        here, there = merged(one, given, torch.device("cpu")), merged(one, given, device)
        apart = max(_apart(there[0][n], expected) for n, expected in here[0].items())
        print(
            f"  {name:16} fold {here[1]:7.2f} {there[1]:7.2f}  read {here[2]:7.2f} {there[2]:7.2f}  apart {apart:.1e}",
            flush=True,
        )
        if not apart <= TOLERANCE:  # NaN compares false
            differ.append(name)
    return differ + blocks(width, device)


def blocks(width: int, device: torch.device) -> list[str]:
    """The same of the triplets of an adapter, and of a matrix of full rank."""
    random, differ = torch.Generator().manual_seed(1), []
    left, right = (torch.randn(4 * width, 16, generator=random) for _ in "ab")
    matrix = fine_tunes(width, 1)[0]["tall"]
    made: dict[str, Callable[[torch.device], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {
        "triplets": lambda place: triplets(left.to(place), right.to(place))[:3],
        "decomposed": lambda place: decomposed(matrix.to(place), min(256, width // 4))[:3],
    }
    for name, make in made.items():
        make(device)
        spent, products = [], []
        for place in (torch.device("cpu"), device):
            began = _now(place)
            u, sigma, v = make(place)
            spent.append(_now(place) - began)
            products.append((u * sigma[:, None]).mT.cpu() @ v.cpu())
        apart = _apart(products[1], products[0])
        print(f"  {name:16} {spent[0]:12.3f} {spent[1]:7.3f}{'':25}apart {apart:.1e}")
        if not apart <= TOLERANCE:
            differ.append(name)
    return differ


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def child(state: str, device: str, models: list[str], target: str) -> None:
    """Folds the models and exports; prints seconds of the last fold and of the export, and the peaks of memory."""
    from continual import api
    from continual.config import Settings

    settings = Settings(state=Path(state), device=device, gates=GATES)
    with api.Merge(settings, write=True) as merge:
        for model in models:
            began = time.perf_counter()
            outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
        folded = time.perf_counter()
        merge.export(target)
        ended = time.perf_counter()
    on_device = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps([folded - began, ended - folded, peak(), on_device]))


def commands(shape: adapters.Shape, device: str, chosen: Sequence[str], work: Path) -> None:
    """Prints the commands of both devices beside each other."""
    from continual import making

    base = adapters.base(work / "base", shape, 0)
    size = (base / "model.safetensors").stat().st_size
    given = {
        "whole": [models.fine_tune(base, work / f"whole{n}", n) for n in range(2)],
        "adapter": [adapters.adapter(work / f"adapter{n}", shape, n, base) for n in range(2)],
    }
    print(f"shapes of 8 B, {shape.layers} of 32 layers, {size / 1e9:.1f} GB: seconds, GB of memory, GB on the device")
    for name in chosen:
        form = "adapter" if name == "adapters" else "whole"
        recipe = making.Recipe(width=256) if form == "adapter" else making.Recipe(rule=name)
        for place in dict.fromkeys((device, "cpu")):
            state, target = work / "state", work / "export"
            making.init(base, state, recipe)
            code = (
                "from tests.campaigns.bench.cuda import child; "
                f"child({str(state)!r}, {place!r}, {[str(model) for model in given[form]]!r}, {str(target)!r})"
            )
            done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
            fold, export, memory, on_device = json.loads(done.stdout)
            print(
                f"  {name:16} {place:5} fold {fold:7.1f}  export {export:7.1f}  "
                f"{memory / 1e9:5.2f}  {on_device / 1e9:5.2f}",
                flush=True,
            )
            shutil.rmtree(state)
            shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or, to try this script, cpu")
    parser.add_argument("--width", type=int, default=2048, help="of the matrices that are compared")
    parser.add_argument("--layers", type=int, default=2, help="of the model of 8 B; 0: no whole commands")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS, help="which are run")
    args = parser.parse_args()
    device = pick_device(args.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), "and", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    differ = parity(args.width, device)
    if args.layers:
        with tempfile.TemporaryDirectory() as work:
            commands(adapters.Shape(args.layers, 4096, 1024, 14336, 128256), args.device, args.commands, Path(work))
    if differ:
        sys.exit(f"more than {TOLERANCE:g} apart: {', '.join(differ)}")


if __name__ == "__main__":
    main()
