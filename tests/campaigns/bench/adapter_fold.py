"""What the fold of a LoRA adapter costs in a dense state, by how much of the model it touches.

    python -m tests.campaigns.bench.adapter_fold [--rules mean iso-c] [--against CHECKOUT] [--vocabulary 131072]

A bf16 model of the shapes of a 0.5 B one with a vocabulary of 128k, and adapters of rank 16: on all linear layers
(folded first, so that nothing is zero), on two matrices, on the matrices of all attention layers. Each fold has a
process of its own: CPU seconds beyond imports, bytes that it asked the system to read and to write, and its peak memory
beyond what it held before. `--against` names a checkout of another version of continual, which folds the same files
right after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers import models

RANK = 16
HERE = Path(__file__).parents[3]
WORKER = """
import json, os, resource, sys
from pathlib import Path
from continual import api, making
from continual.config import Settings

def io():
    with open("/proc/self/io") as lines:
        found = dict(line.split(": ") for line in lines)
    return int(found["rchar"]), int(found["wchar"])

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

rule, base, state, model = sys.argv[1:]
if not Path(state).exists():
    making.init(Path(base), Path(state), making.Recipe(rule=rule))
with api.Merge(Settings(state=Path(state), workers=1, keep=1), write=True) as merge:
    merge.engine
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    held, began, used = peak(), os.times(), io()
    outcome = merge.fold(Path(model))
    now, after = os.times(), io()
    assert outcome.fate == "folded", outcome.message
    print(json.dumps({
        "cpu": now.user + now.system - began.user - began.system, "wall": now.elapsed - began.elapsed,
        "read": after[0] - used[0], "written": after[1] - used[1], "memory": peak() - held,
    }))
"""


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the model; its output head is its embedding."""
    width, wide, narrow = 896, 4864, 128
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for layer in range(24):
        head = f"model.layers.{layer}"
        found |= {f"{head}.self_attn.{p}_proj.weight": (width, width) for p in "qo"}
        found |= {f"{head}.self_attn.{p}_proj.weight": (narrow, width) for p in "kv"}
        found |= {f"{head}.mlp.{p}_proj.weight": (wide, width) for p in ("gate", "up")}
        found |= {f"{head}.mlp.down_proj.weight": (width, wide)}
        found |= {f"{head}.{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    return found


def adapter(place: Path, made: Mapping[str, tuple[int, ...]], modules: list[str], seed: int) -> Path:
    """A LoRA adapter on these modules, in PEFT layout."""
    random = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for module in modules:
        rows, columns = made[f"{module}.weight"]
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=random) * 0.05
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=random) * 0.01
    place.mkdir()
    save_file(factors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def folded(checkout: Path, rule: str, base: Path, state: Path, model: Path) -> dict[str, float]:
    """The figures of a fold in a process of its own, by the code of `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, rule, str(base), str(state), str(model)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["mean", "iso-c", "opcm"])
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--vocabulary", type=int, default=131072)
    args = parser.parse_args()
    versions = {"this version": HERE} | ({"the other": args.against.absolute()} if args.against else {})
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        made = shapes(args.vocabulary)
        base = models.base(work / "base", shapes=made, dtype=torch.bfloat16)
        linear = [name.removesuffix(".weight") for name in made if "_proj" in name]
        attention = [name for name in linear if "self_attn" in name]
        two = [name for name in attention if ".layers.0." in name and name.rsplit(".", 1)[1] in ("q_proj", "v_proj")]
        adapters = {
            "all linear layers": adapter(work / "all", made, linear, 1),
            "two matrices": adapter(work / "two", made, two, 2),
            "all attention": adapter(work / "attention", made, attention, 3),
        }
        for rule in args.rules:
            for what, model in adapters.items():
                for number, (version, checkout) in enumerate(versions.items()):
                    found = folded(checkout, rule, base, work / f"{rule}-{number}", model)
                    print(
                        f"{rule:>8} {what:>18}, {version}: CPU {found['cpu']:6.2f} s, wall {found['wall']:6.2f} s, "
                        f"read {found['read'] / 1e6:7.0f} MB, written {found['written'] / 1e6:7.0f} MB, "
                        f"memory {found['memory'] / 1e6:6.0f} MB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
