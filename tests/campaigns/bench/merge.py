"""Folding real fine-tunes of a real encoder, against a float64 reference.

    python -m tests.campaigns.bench.encoder --data DIR --out DIR          # once: makes the base and eight fine-tunes
    python -m tests.campaigns.bench.merge --models DIR [--first N]

Folds DIR/fine-tunes in order into a new state with `opcm`. Then every merged task vector, before any cast, is compared
with OPCM as the paper writes it in float64 with full singular value decompositions (tests/reference.py), which reads
the fine-tunes by the safetensors library alone; adapters are merged by PEFT. Last, the export is loaded by transformers
and its weights compared with base plus merged task vector.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel
from transformers import logging as transformers_logging

from continual import api, making
from continual.config import Settings
from continual.publish.folder import Target
from tests.helpers import reference

BOUND = 1e-5


def weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory, whole."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def task_vector(base: Path, model: Path, names: set[str]) -> dict[str, Tensor]:
    """θ_t − θ₀ in float32, θ₀ cast to the fine-tune's dtype where that is narrower; an adapter as PEFT merges it, in
    float64 to lose nothing there."""
    origin = weights(base)
    if (model / "adapter_config.json").is_file():
        return _adapter(base, model, names)
    tuned = weights(model)
    return {name: tuned[name].float() - origin[name].to(tuned[name].dtype).float() for name in names}


def _adapter(base: Path, model: Path, names: set[str]) -> dict[str, Tensor]:
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(AutoModel.from_pretrained(base, local_files_only=True).double(), model).double()
    before = {
        k.replace(".base_layer", "").removeprefix("base_model.model."): v.clone()
        for k, v in wrapped.state_dict().items()
        if "lora_" not in k
    }
    after = wrapped.merge_and_unload().state_dict()
    return {name: (after[name] - before[name]).float() for name in names}


def fold(base: Path, models: list[Path], work: Path) -> dict[str, Tensor]:
    """Folds `models` with opcm, exports, and returns the merged task vectors."""
    making.init(base, work / "state", making.Recipe(rule="opcm", scale="paper"))
    with api.Merge(Settings(state=work / "state"), write=True) as merge:
        for model in models:
            outcome = merge.fold(model)
            if outcome.fate != "folded":
                raise SystemExit(outcome.line())
            print(outcome.line())
        merge.export(Target(work / "export"))
        return {s.name: merge.read(s.name) for s in merge.base.specs if s.kind != "carried"}


def compare(base: Path, models: list[Path], work: Path, merged: dict[str, Tensor]) -> float:
    """The largest relative Frobenius distance of a merged task vector from its reference; prints a line a kind."""
    format_ = json.loads((work / "state" / "format.json").read_text().split("\n", 1)[1])
    matrices = {t["name"] for t in format_["tensors"] if t["kind"] == "matrix"}
    taus = [
        task_vector(base, model, set(merged))
        for model in track(models, "task vectors", disable=not sys.stdout.isatty())
    ]
    expected = reference.opcm(taus, matrices, alpha=0.5)
    errors = {
        n: float((merged[n].double() - expected[n]).norm() / expected[n].norm())
        for n in merged
        if float(expected[n].norm()) > 0
    }
    zero = [n for n in merged if n not in errors and bool(merged[n].any())]
    for kind, names in (("matrices", errors.keys() & matrices), ("plain", errors.keys() - matrices)):
        worst = max(names, key=errors.__getitem__)
        print(f"{len(names)} {kind}: largest relative distance from float64 {errors[worst]:.2e} ({worst})")
    print(f"{len(merged) - len(errors)} never changed, {len(zero)} of them not exactly zero")
    return max([*errors.values(), *(float("inf") for _ in zero)])


def loads(base: Path, export: Path, merged: dict[str, Tensor]) -> int:
    """Checks that transformers loads the export with the weights it should have; returns how many were compared."""
    origin, loaded = weights(base), AutoModel.from_pretrained(export, local_files_only=True).state_dict()
    compared = 0
    for name, tau in merged.items():
        if name in loaded:
            torch.testing.assert_close(
                loaded[name].float(), (origin[name].float() + tau).to(loaded[name].dtype).float(), rtol=0, atol=0
            )
            compared += 1
    return compared


def run(base: Path, models: list[Path]) -> float:
    """Everything; returns the largest distance. Raises AssertionError if the export differs from base plus merged task
    vector."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        merged = fold(base, models, work)
        worst = compare(base, models, work, merged)
        print(
            f"transformers loads the export; {loads(base, work / 'export', merged)} tensors are base plus "
            "merged task vector, bit for bit"
        )
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder that tests.campaigns.bench.encoder made")
    parser.add_argument("--first", type=int, help="fold only the first N")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    models = sorted((args.models / "fine-tunes").iterdir(), key=lambda p: p.name)[: args.first]
    worst = run(args.models / "base", [m for m in models if not m.name.startswith(".")])
    print(f"{'within' if worst < BOUND else 'BEYOND'} {BOUND:.0e}")
    sys.exit(worst >= BOUND)


if __name__ == "__main__":
    main()
