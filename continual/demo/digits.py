"""What the demonstration learns: a small transformer on scikit-learn's handwritten digits, and fine-tunes of it for
shifted versions of the task.

The base learns upright, clean digits. Each fine-tune learns the same ten classes seen another way (shifted, noisy, half
hidden, …). That is a setting in which merging is meaningful: one set of weights can serve all the ways of seeing at
once, each fine-tune knows one of them, and none of the data is shared. Which images are held out is fixed before
anything is trained; nothing is chosen by them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, LAYERS, HEADS = 64, 2, 4
TRAINED = 1200
"""Images that are learned from; the other 597 are held out."""


def _noise(images: Tensor, seed: int) -> Tensor:
    return (images + 0.45 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def _blur(images: Tensor) -> Tensor:
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    blurred: Tensor = functional.conv2d(images[:, None], kernel, padding=1)[:, 0]
    return blurred


def _half(images: Tensor) -> Tensor:
    hidden = images.clone()
    hidden[:, :, 5:] = 0.0
    return hidden


def _shift(images: Tensor, rows: int, columns: int) -> Tensor:
    return torch.roll(images, (rows, columns), (1, 2))


TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "shifted left": lambda x: _shift(x, 0, -1),
    "shifted right": lambda x: _shift(x, 0, 1),
    "shifted up": lambda x: _shift(x, -1, 0),
    "shifted down": lambda x: _shift(x, 1, 0),
    "noisy": lambda x: _noise(x, 7),
    "faint": lambda x: 0.3 * x,
    "blurred": lambda x: 0.6 * _blur(x),
    "half hidden": _half,
}
"""Ways of seeing the same digits; each maps images (N × 8 × 8, from 0 to 1) to images."""


class Residual(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down_proj(functional.gelu(self.up_proj(self.norm2(x))))
        return out


class Digits(nn.Module):
    """Images N × 8 × 8 to logits N × 10: the eight rows of pixels as tokens, their mean to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(8, WIDTH) * 0.02)
        self.layers = nn.ModuleList(Residual() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.embed(images * 2 - 1) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then held-out images and labels, split by `seed`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(data.images, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    return images[:TRAINED], labels[:TRAINED], images[TRAINED:], labels[TRAINED:]


def train(model: Digits, images: Tensor, labels: Tensor, *, steps: int, rate: float, seed: int) -> Digits:
    """AdamW on batches of 64 drawn by `seed`, the rate falling to zero as a cosine."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,), generator=random)
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of `images` that a model with these weights gets right."""
    model = Digits()
    model.load_state_dict(dict(weights))
    return float((model(images).argmax(1) == labels).float().mean())


def base(seed: int) -> dict[str, Tensor]:
    """Weights after learning upright, clean digits."""
    torch.manual_seed(seed)
    images, labels, _, _ = load(seed)
    return _weights(train(Digits(), images, labels, steps=500, rate=2e-3, seed=seed))


def fine_tune(origin: Mapping[str, Tensor], task: str, seed: int) -> dict[str, Tensor]:
    """Weights after learning `task` from `origin`."""
    images, labels, _, _ = load(seed)
    model = Digits()
    model.load_state_dict(dict(origin))
    return _weights(train(model, TASKS[task](images), labels, steps=80, rate=1e-3, seed=seed + 1))


def save(weights: Mapping[str, Tensor], directory: Path) -> None:
    """A model directory, made under a temporary name and renamed into place, as publishers should."""
    from safetensors.torch import save_file

    temporary = directory.with_name(f".{directory.name}.tmp")
    temporary.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        temporary / "model.safetensors",
        metadata={"format": "pt"},
    )
    (temporary / "config.json").write_text(
        json.dumps(
            {
                "model_type": "digits",
                "hidden_size": WIDTH,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
            }
        )
    )
    temporary.rename(directory)


def _weights(model: Digits) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
