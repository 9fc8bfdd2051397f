"""Bases with the rows of two tasks beside them, and what a calibration says it computes: a row at a time, by a dense
search."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from continual.objectives.calibration import Calibration, load
from continual.objectives.classes import WIDEST
from continual.objectives.heads import TEMPERATURE
from continual.objectives.wanted_losses import Wanted
from tests.helpers.pools import wanted
from tests.helpers.tiny import CPU, MODELS, WORDS, embedded, loaded, transformers, write_tokenizer

CLASSES = ["neg", "pos"]
ROWS = 24

PROMPTS = {"neg": ["bad", "very bad film"], "pos": ["good", "a good book", "the good film is good"]}


def changed(given: Wanted, **changes: Any) -> Wanted:
    """With other files, or other settings."""
    files = {name: changes.pop(name) for name in ("objective", "rows", "heads") if name in changes}
    return replace(given, **files, settings=given.settings.model_copy(update=changes))


class Calibrated(NamedTuple):
    """A base and rows of two tasks beside it."""

    base: Path
    wanted: Wanted

    def load(self, **changes: Any) -> Calibration:
        return load(changed(self.wanted, **changes), self.base, CPU)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def fixed_heads(name: str, base: Path) -> Any:
    """Class heads as `Heads` documents them, of the base: classes × width."""
    if name != "heads":
        return None
    model, tokenizer = loaded(name, base), transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return functional.normalize(
            torch.stack([embedded(model, tokenizer, p).mean(0) for p in PROMPTS.values()]), dim=-1
        )


def plain_logits(name: str, model: Any, base: Path, texts: list[str]) -> torch.Tensor:
    """One text after the other, without padding: rows × classes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if name == "heads":
        return (embedded(model, tokenizer, texts) @ fixed_heads(name, base).T / TEMPERATURE).double()
    return torch.cat([model(torch.tensor([tokenizer(t)["input_ids"]])).logits for t in texts]).double()


def searched(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The best confidence, by ever denser grids of its logarithm."""
    low, high = -WIDEST, WIDEST
    for _ in range(6):
        grid = torch.linspace(low, high, 401, dtype=torch.float64)
        losses = torch.stack([functional.cross_entropy(b * logits, labels) for b in grid.exp()])
        best = int(losses.argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 400)])
    return float(grid[best].exp())


def plain_losses(name: str, model: Any, base: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    """What the calibration says it computes, a row at a time."""
    if name == "causal-lm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        ids = [torch.tensor([tokenizer(row["text"])["input_ids"]]) for row in rows]
        return torch.stack([model(i, labels=i).loss for i in ids]).double()
    logits = plain_logits(name, model, base, [row["text"] for row in rows])
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    return functional.cross_entropy(searched(logits.detach(), labels) * logits, labels, reduction="none")


def slopes(model: Any) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], within: float) -> None:
    """The whole gradients, relative to their length."""
    a, b = (torch.cat([g[n].double().flatten() for n in sorted(g)]) for g in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert float(b.norm()) > 1e-3
    assert float((a - b).norm() / b.norm()) < within


def made(name: str, place: Path) -> Calibrated:
    """Two tasks whose rows the base mostly gets right, every third one not, so that no fitted confidence is at its
    bounds."""
    torch.manual_seed(0)
    base = place / "base"
    MODELS[name]().save_pretrained(base)
    write_tokenizer(base)
    heads = place / "heads.json"
    heads.write_text(json.dumps(PROMPTS))
    files = []
    for task in range(2):
        draw = random.Random(task)
        texts = [" ".join(draw.choices(WORDS[2:], k=draw.randint(2, 9))) for _ in range(ROWS)]
        classes = [draw.randrange(2) for _ in texts]
        if name != "causal-lm":
            with torch.no_grad():
                classes = plain_logits(name, loaded(name, base), base, texts).argmax(1).tolist()
        labels = [CLASSES[c ^ (i % 3 == 0)] for i, c in enumerate(classes)]
        files.append(
            write(place / f"task-{task}.jsonl", [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)])
        )
    return Calibrated(base, wanted(name, tuple(files), (heads, heads) if name == "heads" else (), batch=5, seed=3))
