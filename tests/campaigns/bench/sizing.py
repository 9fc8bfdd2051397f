"""What models of known sizes take: disk, memory and time by rule and form, as `continual plan --init` says it here.

    python -m tests.campaigns.bench.sizing [--models 0.5B 1B 8B 70B] [--rules tsv-m iso-c task-arithmetic] [--workers N]

Of each model only the headers are made, in bfloat16. Printed is the table of `ops/docs/sizing.md`; of a state of
adapters, what it takes at most at the width that is the default.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from continual.texts import duration, size
from tests.campaigns.bench.forecast import said

RULES = ("tsv-m", "iso-c", "task-arithmetic")
HEAD = (
    "| model | weights | state | one generation | kept (`keep = 3`) | fold: memory, time | export: memory, time |\n"
    "|---|---|---|---|---|---|---|"
)


class Architecture(NamedTuple):
    """The sizes of a decoder; `tied`: head and embedding are one table."""

    hidden: int
    inner: int
    layers: int
    key_value: int
    vocabulary: int
    tied: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by the names of transformers."""
        h = self.hidden
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in (f"model.layers.{n}" for n in range(self.layers)):
            for name, rows in (("q", h), ("k", self.key_value), ("v", self.key_value), ("o", h)):
                found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, h)
            found |= {f"{layer}.mlp.{name}_proj.weight": (self.inner, h) for name in ("gate", "up")}
            found[f"{layer}.mlp.down_proj.weight"] = (h, self.inner)
            found |= {f"{layer}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        found["model.norm.weight"] = (h,)
        return found if self.tied else found | {"lm_head.weight": (self.vocabulary, h)}


MODELS = {
    "0.5B": Architecture(896, 4864, 24, 128, 151_936, tied=True),
    "1B": Architecture(2048, 8192, 16, 512, 128_256, tied=True),
    "8B": Architecture(4096, 14_336, 32, 1024, 128_256, tied=False),
    "70B": Architecture(8192, 28_672, 80, 1024, 128_256, tied=False),
}
"""The sizes of Qwen2.5-0.5B (without biases), Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B."""


def headers(of: Architecture, directory: Path) -> int:
    """Writes the header of a model and nothing behind it; returns the bytes that the weights would take."""
    end, entries = 0, {}
    for name, shape in of.shapes().items():
        start, numel = end, 1
        for side in shape:
            numel *= side
        end = start + 2 * numel
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(entries).encode()
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": of.tied}))
    return end


def rows(name: str, rules: list[str], workers: int, work: Path) -> list[str]:
    """The rows of one model."""
    base = work / name
    nbytes = headers(MODELS[name], base)
    weights = size(nbytes)
    found = []
    for rule in rules:
        plan = said("plan", "--init", base, "--rule", rule, "--state", work / "state", "--workers", workers)
        works = [f"{size(one['memory_bytes'])}, {duration(one['seconds'])}" for one in (plan["fold"], plan["export"])]
        cells = [name, weights, f"`{rule}`", size(plan["state_bytes"]), size(plan["kept_bytes"]), *works]
        found.append(f"| {' | '.join(cells)} |")
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size + nbytes)  # init looks whether the file is as long as it says; it stays empty
    made = said("init", base, "--adapters", "--dry-run", "--state", work / "state")
    most = f"at most {size(made['state_bytes'])}"
    found.append(f"| {name} | {weights} | `--adapters` | {most} | {most} each | | |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(HEAD)
    with tempfile.TemporaryDirectory() as work:
        for name in args.models:
            print("\n".join(rows(name, args.rules, args.workers, Path(work))), flush=True)


if __name__ == "__main__":
    main()
