"""Polluted pools: eight fine-tunes of a suite whose tasks its owner wants, and others that are of no use to them; with
a few calibration rows of each wanted task.

Of the others one half is trained on tasks outside the calibration set, the other half on the wanted tasks' rows with
their labels permuted. The rows that calibrate were never trained on, and are not those that judge.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from continual.demo import digits as demo
from continual.objectives import Given, Said
from tests.campaigns.bench import data, encoder
from tests.campaigns.bench.quality import digits as ways
from tests.campaigns.bench.quality import text
from tests.campaigns.bench.quality.suite import Form, Suite, fine_tune, once

RELEVANT, ROWS = 8, 100
POLLUTED = (0, 4, 8, 16)


class World:
    """The pools of one seed, in `folder`: which tasks are wanted, which models wait, in which order, and what says what
    is good."""

    def __init__(self, suite: Suite, seed: int, folder: Path, rows: int = ROWS) -> None:
        self.suite, self.seed, self.folder, self.count = suite, seed, folder, rows
        tasks = list(suite.tasks)
        random.Random(1000 + seed).shuffle(tasks)
        self.wanted, self._off = tasks[:RELEVANT], tasks[RELEVANT : 2 * RELEVANT]
        folder.mkdir(parents=True, exist_ok=True)

    def members(self, irrelevant: int) -> list[tuple[str, Path]]:
        """Names and directories of a pool with so many irrelevant models, in the order in which they come; a wanted
        one's name begins with `good`."""
        half = irrelevant // 2
        chosen: list[tuple[str, str, Form]] = [("good", task, "full") for task in self.wanted]
        chosen += [("off", task, "full") for task in self._off[:half]] + [
            ("noise", task, "shuffled") for task in self.wanted[:half]
        ]
        random.Random(2000 + self.seed).shuffle(chosen)
        return [
            (f"{kind}-{task}", self._link(f"{kind}-{task}", fine_tune(self.suite, task, form)))
            for kind, task, form in chosen
        ]

    def random(self, irrelevant: int) -> list[tuple[str, Path]]:
        """The same pool, and in place of each model one that learned nothing: of each tensor normal numbers, as long as
        the model's change of it."""
        return [(name, self._random(name, path)) for name, path in self.members(irrelevant)]

    def _random(self, name: str, path: Path) -> Path:
        def write(temporary: Path) -> None:
            temporary.mkdir()
            base = load_file(self.suite.prepare() / "model.safetensors")
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            found = {}
            for key, value in load_file(path / "model.safetensors").items():
                drawn = torch.randn(value.shape, generator=generator)
                found[key] = base[key] + drawn * ((value - base[key]).norm() / drawn.norm())
            save_file(found, temporary / "model.safetensors", {"format": "pt"})
            shutil.copy(path / "config.json", temporary)

        target = self.folder / "random" / name
        once(target, write)
        return target

    def _link(self, name: str, target: Path) -> Path:
        link = self.folder / "pool" / name
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target.resolve())
        return link


class TextWorld(World):
    """Sentence encoder, frozen class heads."""

    def settings(self) -> dict[str, Any]:
        """The objective's: rows and prompts in files, as a user has them."""
        rows, heads = [], []
        for task in self.wanted:
            found, calibration = self._set(task), self._rows(task)
            file = self.folder / f"{task}.jsonl"
            lines = [
                json.dumps({"text": t, "label": str(n)})
                for t, n in zip(calibration.texts, calibration.labels, strict=True)
            ]
            file.write_text("\n".join(lines) + "\n")
            rows.append(file)
            heads.append(self.folder / f"{task}.json")
            heads[-1].write_text(
                json.dumps({str(number): list(prompts) for number, prompts in enumerate(found.prompts)})
            )
        return {
            "objective": "heads",
            "rows": tuple(rows),
            "heads": tuple(heads),
            "rounds": {"dtype": "bfloat16", "batch": 32},
        }

    def learn(
        self,
        form: Form = "full",
        start: Mapping[str, Tensor] | None = None,
        steps: int = 400,
        dtype: torch.dtype = torch.bfloat16,
    ) -> dict[str, Tensor]:
        """The base, or the weights `start`, fine-tuned on the calibration rows themselves: steps of 16 rows of one task
        after the other, products in `dtype`."""
        model = encoder.Encoder(self.suite.prepare())
        parts = [(self._rows(task), encoder.heads(model, self._set(task))) for task in self.wanted]
        if start is not None:
            model.model.load_state_dict({n: start.get(n, v) for n, v in model.model.state_dict().items()})
        torch.manual_seed(self.seed)
        if form == "lora":
            from peft import LoraConfig, get_peft_model

            model.model = get_peft_model(model.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        learned = [p for p in model.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=text.RATES[form], weight_decay=0.01)
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        model.model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = text.RATES[form] * min((step + 1) / 40, (steps - step) / (steps - 39))
            rows, head = parts[step % len(parts)]
            batch = torch.randperm(len(rows), generator=generator)[: encoder.BATCH].tolist()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
                logits = model([rows.texts[i] for i in batch]) @ head.T / encoder.TEMPERATURE
                loss = functional.cross_entropy(logits.float(), torch.tensor([rows.labels[i] for i in batch]))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        done = model.model.eval().merge_and_unload() if form == "lora" else model.model.eval()
        return {name: value.detach().clone() for name, value in done.named_parameters()}

    def _rows(self, task: str) -> data.Rows:
        """Rows that are neither trained on, nor those by which the quality benchmark chooses, nor tested on."""
        held = self._set(task).train.last(text.HELD)
        left = list(range(text.VALIDATION, len(held)))
        random.Random(f"{self.seed} {task}").shuffle(left)
        return data.Rows(
            tuple(held.texts[i] for i in left[: self.count]), tuple(held.labels[i] for i in left[: self.count])
        )

    def _set(self, task: str) -> data.TextSet:
        assert isinstance(self.suite, text.Text)
        return self.suite.rows(task)


class DigitsWorld(World):
    """The demonstration's transformer, digits seen in other ways."""

    def settings(self) -> dict[str, Any]:
        """The objective's: a function, which takes the rows of the world that is at work."""
        Seen.world = self
        return {"objective": "tests.campaigns.bench.selection.world:digits"}

    def learn(self, form: Form = "full") -> dict[str, Tensor]:
        """The base fine-tuned on the calibration rows themselves, by the recipe of the fine-tunes of this form."""
        model = demo.Digits()
        model.load_state_dict(load_file(self.suite.prepare() / "model.safetensors"))
        rows = [self.rows(task) for task in self.wanted]
        images, labels = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
        if form == "full":
            demo.train(model, images, labels, steps=2 * ways.STEPS[form], rate=ways.RATES[form], seed=self.seed)
            return {name: value.detach().clone() for name, value in model.state_dict().items()}
        wrapped = ways.adapted(model, self.seed, frozen=False)
        demo.train(wrapped, images, labels, steps=2 * ways.STEPS[form], rate=ways.RATES[form], seed=self.seed)
        merged = wrapped.merge_and_unload()
        return {name: value.detach().clone() for name, value in merged.state_dict().items()}

    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        """Calibration images and labels of a task: of the held-out images that choose in the quality benchmark."""
        _, _, images, labels = demo.load(ways.SEED)
        chosen = list(range(ways.VALIDATION))
        random.Random(f"{self.seed} {task}").shuffle(chosen)
        way = dict(zip(self.suite.tasks, ways.WAYS.values(), strict=True))[task]
        return way(images)[chosen[:ROWS]], labels[chosen[:ROWS]]


class Seen:
    """A task of the digits: the logits' confidence is fitted, as the built-in objectives do."""

    world: DigitsWorld

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels, self.count, self.confidence = model, images, labels, len(labels), 1.0

    def says(self, rows: Sequence[int]) -> Said:
        """The logits, for a teacher."""
        return Said(self.model(self.images[list(rows)]), torch.arange(len(rows)))

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Cross-entropy at the confidence that was fitted."""
        return functional.cross_entropy(
            self.confidence * self.model(self.images[list(rows)]), self.labels[list(rows)], reduction="none"
        )

    def fit(self, rows: Sequence[int]) -> Tensor:
        """The best confidence on these rows."""
        from continual.objectives import fitted

        with torch.no_grad():
            logits, labels = self.model(self.images[list(rows)]), self.labels[list(rows)]
            self.confidence = fitted(logits, labels)
            return functional.cross_entropy(self.confidence * logits, labels, reduction="none")


def digits(directory: Path, device: torch.device) -> Given:
    """The objective of the digits, as `module:function`."""
    model = demo.Digits()
    model.load_state_dict(load_file(directory / "model.safetensors"))
    model.to(device).eval()
    return Given(model, [Seen(model, *Seen.world.rows(task)) for task in Seen.world.wanted])


WORLDS: Mapping[str, Callable[[Suite, int, Path], World]] = {"text": TextWorld, "digits": DigitsWorld}
