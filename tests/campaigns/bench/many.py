"""What work costs beyond one machine's disk and process, against the same work on them.

    python -m tests.campaigns.bench.many stores --gigabytes 0.2 --times 5 [--store seaweedfs]

`stores`: the same folds (`mean`, `tsv-m`), readings and openings of a state in a directory and of one on an object
store on loopback, taking turns: wall and CPU seconds of this process, and of the server (which is another one, and
whose work is a network's elsewhere), medians, and their ratio. `half` are folds of a model that lacks half of the
tensors, which are linked on a disk and copied by the store. Requests on loopback take a fraction of a millisecond:
`--late` puts so many milliseconds before each answer, as a store in the same region has.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import settings_of
from continual.state import State
from continual.state.verify import verify
from continual.stores import Where, where
from tests.helpers import models, object_stores
from tests.helpers.cutting import cutting

Seconds = tuple[float, float]
"""Wall and CPU of this process."""


def timed(work: Callable[[], object]) -> Seconds:
    """What some work took."""
    began, clock = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - clock, time.process_time() - began


def stores(gigabytes: float, times: int, store: str, late: float) -> None:
    """Prints the table of a directory against an object store."""
    found: dict[tuple[str, str], list[Seconds]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        work = Path(temporary)
        address = stack.enter_context(object_stores.serving(store, work))
        if late:
            proxy = stack.enter_context(cutting(address))
            proxy.decide, proxy.late = lambda _method, _path: "late", late / 1000
            address = proxy.address
        os.environ.update(object_stores.environment(address))
        base = models.base(work / "base", shapes=models.big_shapes(gigabytes, layers=12))
        for rule in ("mean", "tsv-m"):
            places: dict[str, Where] = {"disk": work / rule, "store": where(f"s3://{object_stores.BUCKET}/{rule}")}
            for place in places.values():
                making.init(base, place, making.Recipe(rule=rule))
            for number in range(times + 1):
                model = models.fine_tune(base, work / f"{rule}-{number}", number)
                half = _half(model, work / f"{rule}-{number}-half")
                for name, place in places.items():
                    with api.Merge(_settings(place), write=True) as merge:
                        whole = timed(partial(merge.fold, model)), timed(partial(merge.fold, half))
                        if number:
                            found[f"fold, {rule}", name].append(whole[0])
                            found[f"fold of half, {rule}", name].append(whole[1])
            for number in range(times):
                for name, place in places.items():
                    found["open", name].append(timed(lambda place=place: State.open(place).close()))
                    with State.open(place) as state:
                        found["verify", name].append(timed(partial(verify, state)))
                    with api.Merge(_settings(place)) as merge:
                        to = work / f"out-{rule}-{name}-{number}"
                        found[f"export, {rule}", name].append(timed(partial(merge.export, to)))
    _told(found, f"{gigabytes} GB, {times} times, {store}" + (f", {late:g} ms before each answer" if late else ""))


def _settings(place: Where) -> api.Settings:
    return settings_of({"state": place, "keep": 1, "gates": ["noise.act=off"], "missing": "unchanged"})


def _half(model: Path, to: Path) -> Path:
    """The same model without every second tensor, another one where they are there."""
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensors[name] + torch.full((), 1e-4) for name in sorted(tensors)[::2]}
    return models.write(to, kept)


def _told(found: dict[tuple[str, str], list[Seconds]], what: str) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: {what}")
    print("| | disk, s | store, s | ratio | CPU, disk | CPU, store | ratio |")
    print("|---|---|---|---|---|---|---|")
    for row in dict.fromkeys(row for row, _ in found):
        disk, store = ([statistics.median(one) for one in zip(*found[row, n], strict=True)] for n in ("disk", "store"))
        both = list(zip(found[row, "disk"], found[row, "store"], strict=True))
        ratios = [statistics.median(s[i] / max(d[i], 1e-9) for d, s in both) for i in range(2)]
        cells = (disk[0], store[0], ratios[0], disk[1], store[1], ratios[1])
        print(f"| {row} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stores",))
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--store", choices=("moto", "seaweedfs"), default="seaweedfs")
    parser.add_argument("--late", type=float, default=0.0, help="milliseconds before each answer")
    args = parser.parse_args()
    stores(args.gigabytes, args.times, args.store, args.late)


if __name__ == "__main__":
    main()
