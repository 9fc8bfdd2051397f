"""What `continual import-recipe` makes of mergekit's configurations, beside what mergekit itself makes of them.

    python -m tests.campaigns.recipes [--env DIR | --python PYTHON] [--seed N]

Each configuration merges fine-tunes of a small model, by mergekit's command and by the commands that are printed for
it. Both write float32; the table has the largest distance of a tensor, relative to how far mergekit moved it from the
base. More than `ROUNDING` is an error, and the exit code 1; of what is drawn by chance the lengths are compared.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.campaigns.bench.costs import MERGEKIT, one_file
from tests.campaigns.bench.peers import PINS, environment
from tests.campaigns.bench.ran import python as run_python
from tests.helpers import models

ROUNDING = 1e-4
"""Float32 sums in another order."""
CUT, CHANCE = 0.08, 0.1
"""Breadcrumbs are one number a tensor apart at each end, and what is dropped is drawn by chance: both are compared on
tensors of at least `LARGE` numbers, where that is little, the latter by length."""
LARGE = 4096
SHAPES = {
    "model.embed_tokens.weight": (96, 64),
    "model.norm.weight": (64,),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            **{f"self_attn.{p}_proj": (64, 64) for p in "qkvo"},
            **{f"mlp.{p}_proj": (128, 64) for p in ("gate", "up")},
            "mlp.down_proj": (64, 128),
            "input_layernorm": (64,),
            "post_attention_layernorm": (64,),
        }.items()
    },
}


def cases(base: str, a: str, b: str, c: str) -> dict[str, tuple[dict[str, Any], float]]:
    """Configurations by name, with how far the two may lie apart."""

    def listed(*rows: tuple[str, Mapping[str, float]]) -> list[dict[str, Any]]:
        return [{"model": name, "parameters": dict(parameters)} for name, parameters in rows]

    weighted = listed((a, {"weight": 0.7}), (b, {"weight": 0.2}), (c, {"weight": 0.4}))
    dense = listed(*((name, {"weight": 0.5, "density": 0.3}) for name in (a, b, c)))
    with_base = [*listed((base, {"weight": 1.0})), *weighted]
    on = {"base_model": base}
    return {
        "linear": ({"merge_method": "linear", "models": weighted}, ROUNDING),
        "linear, a weight for all": (
            {"merge_method": "linear", **on, "models": [{"model": a}, {"model": b}], "parameters": {"weight": 0.5}},
            ROUNDING,
        ),
        "linear, the base among them": ({"merge_method": "linear", **on, "models": with_base}, ROUNDING),
        "task_arithmetic": (
            {"merge_method": "task_arithmetic", **on, "models": weighted, "parameters": {"lambda": 0.6}},
            ROUNDING,
        ),
        "task_arithmetic, normalised": (
            {"merge_method": "task_arithmetic", **on, "models": weighted, "parameters": {"normalize": True}},
            ROUNDING,
        ),
        "ties": ({"merge_method": "ties", **on, "models": dense}, ROUNDING),
        "ties, lambda": ({"merge_method": "ties", **on, "models": dense, "parameters": {"lambda": 0.4}}, ROUNDING),
        "breadcrumbs": (
            {"merge_method": "breadcrumbs", **on, "models": dense, "parameters": {"gamma": 0.02}},
            CUT,
        ),
        "dare_linear": ({"merge_method": "dare_linear", **on, "models": dense}, CHANCE),
    }


def ours(config: Path, base: Path, work: Path) -> Path:
    """Types what is printed for a configuration; where the merge lies."""
    told = subprocess.run(
        [sys.executable, "-m", "continual", "import-recipe", str(config), "--base", str(base), "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    recipe = json.loads(told.stdout)
    work.mkdir()
    (work / "continual.toml").write_text(recipe["settings"])
    for line in recipe["commands"]:
        words = shlex.split(line)
        gates = ["--gate", "noise.act=off", "--gate", "copies.act=off"] if words[1] == "fold" else []
        subprocess.run(
            [sys.executable, "-m", "continual", *words[1:], *gates], check=True, cwd=work, stdout=subprocess.DEVNULL
        )
    return work / "merged"


def compared(base: Path, theirs: Path, found: Path, most_allowed: float) -> float:
    """How far the two lie apart at most, relative to what the peer changed."""
    before, a, b = (load_file(directory / "model.safetensors") for directory in (base, theirs, found))
    most = 0.0
    for name, start in before.items():
        if most_allowed > ROUNDING and start.numel() < LARGE:
            continue
        first, second = (merged[name].double() - start.double() for merged in (a, b))
        apart = abs(first.norm() - second.norm()) if most_allowed == CHANCE else (first - second).norm()
        most = max(most, float(apart / first.norm()))
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path.home() / ".cache/continual/peers")
    parser.add_argument("--python", type=Path, help="a python that has mergekit, in place of --env")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    by = args.python or environment(args.env / "mergekit", PINS["mergekit"])
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = models.base(work / "base", shapes=SHAPES, seed=args.seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "num_attention_heads": 4}
        config = {**models.CONFIG, **sizes, "num_key_value_heads": 4, "tie_word_embeddings": True}
        (base / "config.json").write_text(json.dumps(config))
        tuned = [str(models.fine_tune(base, work / name, args.seed + n)) for n, name in enumerate(("a", "b", "c"))]
        for number, (name, (given, most)) in enumerate(cases(str(base), *tuned).items()):
            file = work / f"{number}.yml"
            file.write_text(json.dumps({**given, "dtype": "float32"}))  # JSON is YAML
            target = work / f"theirs-{number}"
            words = (str(file), str(target), "--no-copy-tokenizer", "--quiet")
            run_python(MERGEKIT, *words, by=str(by), env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
            apart = compared(base, one_file(target), ours(file, base, work / f"ours-{number}"), most)
            print(f"{name}: {apart:.1e}{'' if apart <= most else f', more than {most:g}'}", flush=True)
            wrong += apart > most
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
