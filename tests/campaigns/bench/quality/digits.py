"""The suite *digits*: the demonstration's small transformer, and fine-tunes of it for other ways of seeing the same
handwritten digits.

The first eight ways are the demonstration's own. The held-out images are split once: the first 200 choose read-time
options, the other 397 judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from continual.demo import digits
from tests.campaigns.bench.quality.suite import Form, Part, once

VALIDATION = 200
SEED = 0
STEPS: Mapping[Form, int] = {"full": 80, "lora": 120, "shared": 120, "seeded": 120, "shuffled": 80}
RATES: Mapping[Form, float] = {"full": 1e-3, "lora": 2e-3, "shared": 4e-3, "seeded": 2e-3, "shuffled": 1e-3}


def _turned(degrees: float) -> Callable[[Tensor], Tensor]:
    angle = torch.tensor(degrees * torch.pi / 180)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return lambda x: _warped(x, turn)


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: _warped(x, torch.eye(2) / factor)


def _sheared(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: _warped(x, torch.tensor([[1.0, by], [0.0, 1.0]]))


def _warped(images: Tensor, matrix: Tensor) -> Tensor:
    grid = functional.affine_grid(
        torch.cat([matrix, torch.zeros(2, 1)], 1).expand(len(images), 2, 3), [len(images), 1, 8, 8], align_corners=False
    )
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _striped(images: Tensor) -> Tensor:
    kept = images.clone()
    kept[:, 1::2] = 0.5
    return kept


def _lit(images: Tensor) -> Tensor:
    return (images + torch.linspace(0.0, 0.8, 8)).clamp(0, 1)


WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **digits.TASKS,
    "inverted": lambda x: 1.0 - x,
    "turned left": _turned(-30),
    "turned right": _turned(30),
    "small": _scaled(0.7),
    "large": _scaled(1.4),
    "slanted": _sheared(0.5),
    "slanted back": _sheared(-0.5),
    "striped": _striped,
    "lit from the right": _lit,
    "upper half hidden": lambda x: torch.cat([torch.zeros_like(x[:, :3]), x[:, 3:]], 1),
    "two tones": lambda x: (x > 0.4).float(),
    "thick": lambda x: functional.max_pool2d(x[:, None], 3, 1, 1)[:, 0],
}
"""Ways of seeing: images (N × 8 × 8, from 0 to 1) to images."""


class Digits:
    """The suite, in `folder`; its fine-tunes are trained `times` as long as the suite says."""

    name = "digits"

    def __init__(self, folder: Path, times: int = 1) -> None:
        self.folder, self.times = folder, times
        self.tasks = tuple(name.replace(" ", "-") for name in WAYS)
        self._ways = dict(zip(self.tasks, WAYS.values(), strict=True))
        self._model: tuple[digits.Digits, dict[str, Tensor]] | None = None

    def prepare(self) -> Path:
        target = self.folder / "base"
        once(target, lambda temporary: save(digits.base(SEED), temporary))
        return target

    def train(self, task: str, form: Form, target: Path) -> None:
        from safetensors.torch import load_file

        images, labels, _, _ = digits.load(SEED)
        model = digits.Digits()
        model.load_state_dict(load_file(self.prepare() / "model.safetensors"))
        seen, seed = self._ways[task](images), SEED + 1 + self.tasks.index(task)
        if form == "shuffled":
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
        steps = self.times * STEPS[form]
        if form in ("full", "shuffled"):
            digits.train(model, seen, labels, steps=steps, rate=RATES[form], seed=seed)
            save({name: value.detach().clone() for name, value in model.state_dict().items()}, target)
            return
        wrapped = adapted(model, seed if form == "lora" else SEED, frozen=form == "shared")
        digits.train(wrapped, seen, labels, steps=steps, rate=RATES[form], seed=seed)
        wrapped.save_pretrained(target)

    def correct(self, weights: Mapping[str, Tensor], task: str, part: Part) -> Tensor:
        _, _, images, labels = _held_out()
        rows = slice(0, VALIDATION) if part == "validation" else slice(VALIDATION, None)
        model, origin = self._asked()
        model.load_state_dict(origin | dict(weights))
        with torch.no_grad():
            answers = model(self._ways[task](images)[rows]).argmax(1)
        return answers == labels[rows]

    def _asked(self) -> tuple[digits.Digits, dict[str, Tensor]]:
        """A model to put weights in, and the base's."""
        if self._model is None:
            from safetensors.torch import load_file

            self._model = digits.Digits(), load_file(self.prepare() / "model.safetensors")
        return self._model


@cache
def _held_out() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return digits.load(SEED)


def adapted(model: digits.Digits, seed: int, frozen: bool) -> Any:
    """The model with a new adapter around it, as PEFT makes one; with `frozen`, the first factors keep what they were
    drawn as."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=modules))
    for name, parameter in wrapped.named_parameters():
        if frozen and "lora_A" in name:
            parameter.requires_grad_(False)
    return wrapped


def save(weights: Mapping[str, Tensor], target: Path) -> None:
    """A model directory."""
    digits.save(weights, target)
