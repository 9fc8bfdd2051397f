"""Our rules against the functions of mergekit and fusion_bench on the same fine-tunes.

    python -m tests.campaigns.bench.peers [--env DIR] [--json]

Each peer gets a virtual environment of its own in --env (default ~/.cache/continual/peers), made on the first run; they
take some gigabytes. Five random fine-tunes of a small model are folded by the engine and read back; the peers get the
same files. The table shows, per method, the largest difference over all tensors, relative to the peer's result, and
says where it comes from; a difference without a reason is an error and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from continual import api, making
from continual.config import Settings
from tests.helpers import models

PINS = {
    "mergekit": ("torch==2.13.0", "mergekit==0.1.5"),
    "fusion_bench": ("torch==2.13.0", "fusion-bench==0.2.33", "transformers==4.57.3", "datasets==4.4.1"),
}
"""An environment each: mergekit wants transformers 5, which fusion_bench cannot import."""
ALPHA, DENSITY, GAMMA, RATE = 0.5, 0.2, 0.01, 0.7
CRUMBS = "rounds how many it keeps, we round how many go at either end: one change a tensor at most"
ROUNDING = 3e-5
"""Float32 singular value decompositions of the peers: 2e-5 was the most seen on matrices of this size."""


class Case(NamedTuple):
    """A peer's result and ours for it: the rule, its options, the scale; of how many of the fine-tunes. `why` explains
    a difference that is above rounding."""

    rule: str
    options: Mapping[str, object]
    scale: str
    count: int = 5
    why: str = ""


def cases(numel: int) -> dict[str, Case]:
    """By the peer's name for it; `numel` parameters in all."""
    plus_one = (int(DENSITY * numel) + 1.5) / numel
    trim = f"trim:density={DENSITY}:over=tensor"
    return {
        "fusion_bench task arithmetic": Case("task-arithmetic", {}, "0.3"),
        "fusion_bench magmax": Case("magmax", {}, "1"),
        "fusion_bench iso-c": Case("iso-c", {}, "1"),
        "fusion_bench tsv-m": Case("tsv-m", {}, "1"),
        "fusion_bench opcm": Case("opcm", {"alpha": ALPHA, "variant": "block+diagonal"}, "1", 2),
        "fusion_bench ties": Case(
            "ties",
            {"density": DENSITY},
            "1",
            5,
            "keeps one change more than ⌊density·N⌋ of each model (kthvalue of N − ⌊density·N⌋)",
        ),
        "fusion_bench ties, one change more": Case("ties", {"density": plus_one}, "1"),
        "mergekit ties": Case("ties", {"density": DENSITY, "trim": "tensor"}, "1"),
        "mergekit trim": Case("task-arithmetic", {"before": [trim]}, "1", 1),
        "mergekit breadcrumbs": Case(
            "task-arithmetic", {"before": [f"breadcrumbs:top={GAMMA}:bottom={0.5 - GAMMA}"]}, "1", 1, CRUMBS
        ),
    }


def environment(directory: Path, pins: tuple[str, ...]) -> Path:
    """The python of a peer's environment, made where it is not there yet."""
    python, stamp = directory / "bin/python", directory / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(pins):
        sys.stderr.write(f"installing {', '.join(pins)} into {directory} (once) ...\n")
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True)
        stamp.write_text(" ".join(pins))
    return python


def ours(root: Path, base: Path, tuned: list[Path], case: Case) -> dict[str, Tensor]:
    """What the engine makes of the fine-tunes: merged task vectors by name."""
    with tempfile.TemporaryDirectory(dir=root) as state:
        making.init(
            base, Path(state) / "s", making.Recipe(rule=case.rule, options=dict(case.options), scale=case.scale)
        )
        with api.Merge(Settings(state=Path(state) / "s"), write=True) as merge:
            for model in tuned[: case.count]:
                merge.fold(model)
            return {spec.name: merge.read(spec.name) for spec in merge.state.format.tensors}


def difference(found: Tensor, theirs: Tensor) -> float:
    """Frobenius distance relative to the peer's."""
    return float((found.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def dropping(taus: Mapping[str, Tensor], results: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, str, str]]:
    """What each implementation of DARE keeps, and what it multiplies that with: the draws differ, so only these can be
    compared."""
    rows = []
    for name, tensors in results.items():
        kept = torch.cat([tensors[n].flatten() != 0 for n in taus])
        factors = torch.cat([(tensors[n] / tau)[tensors[n] != 0] for n, tau in taus.items()])
        why = (
            "rescales by the L1 norm of each tensor, not by 1/(1 − rate)"
            if "mergekit" in name
            else "draws other random numbers"
        )
        told = (
            f"keeps {float(kept.float().mean()):.1%}, factor {float(factors.min()):.4f} to {float(factors.max()):.4f}"
        )
        rows.append((name, told, why if name != "continual" else f"rate {RATE}: 1/(1 − rate) = {1 / (1 - RATE):.4f}"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--env", type=Path, default=cache / "continual/peers", help="where the virtual environments of the peers are"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    pythons = {peer: environment(arguments.env / peer, pins) for peer, pins in PINS.items()}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        base = models.base(root / "base")
        tuned = [models.fine_tune(base, root / f"ft-{i}", i) for i in range(5)]
        weights = [str(model / "model.safetensors") for model in (base, *tuned)]
        parameters = [str(value) for value in (ALPHA, DENSITY, GAMMA, RATE)]
        worker = Path(__file__).with_name("peers_worker.py")
        peers: dict[str, dict[str, Tensor]] = {}
        for peer, python in pythons.items():
            out = root / f"{peer}.safetensors"
            subprocess.run(
                [python, worker, peer, weights[0], out, *parameters, *weights[1:]],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            for key, tensor in load_file(out).items():
                method, _, name = key.partition("|")
                peers.setdefault(method, {})[name] = tensor
        origin, first = load_file(weights[0]), load_file(weights[1])
        taus = {n: first[n] - origin[n] for n in origin}
        rows, bad = [], 0
        for method, case in cases(sum(t.numel() for t in origin.values())).items():
            theirs, found = peers[method.split(",")[0]], ours(root, base, tuned, case)
            worst = max(difference(found[n], theirs[n]) for n in theirs)
            why = "rounding" if worst <= ROUNDING else case.why or "NOT EXPLAINED"
            if case.why == CRUMBS and max(int(((found[n] != 0) != (theirs[n] != 0)).sum()) for n in theirs) > 1:
                why = "NOT EXPLAINED"
            bad += why == "NOT EXPLAINED"
            rows.append((method, f"{worst:.1e}", why))
        dare = Case("task-arithmetic", {"before": [f"drop:rate={RATE}"]}, "1", 1)
        rows += dropping(
            taus,
            {
                "continual": ours(root, base, tuned, dare),
                "fusion_bench dare": peers["fusion_bench dare"],
                "mergekit dare": peers["mergekit dare"],
            },
        )
    if arguments.json:
        sys.stdout.write(json.dumps([{"method": m, "difference": d, "why": w} for m, d, w in rows], indent=2) + "\n")
    else:
        table = Table("peer's method", "largest relative difference", "where it comes from")
        for row in rows:
            table.add_row(*row)
        Console(width=160).print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
