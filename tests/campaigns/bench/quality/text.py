"""The suite *text*: a 22M-parameter sentence encoder, and fine-tunes of it for short-text classification with frozen
class heads.

The encoder and what is asked of it are those of `tests.campaigns.bench.encoder`. Only the encoder is fine-tuned; a
class's head is the normalised mean of the base's embeddings of the class's prompts, as CLIP's zero-shot heads, so one
merged encoder can be asked about every task. The last 200 training rows of each set are never trained on: read-time
options are chosen by them. Matrix products run in bfloat16 (autocast), as such encoders are served, or in float32,
which a processor without bfloat16 takes a quarter of the time for; weights stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.campaigns.bench import data, encoder
from tests.campaigns.bench.quality.suite import Form, Part

TASKS = (
    *data.SETS,
    "debian_section",
    "wordnet_noun",
    "spam_assassin",
    "gcide_domain",
    "emoji_group",
    "bible_genre",
    "debian_interface",
    "ding_domain",
    "wordnet_verb",
    "fortunes",
    "foldoc",
    "place_country",
    "debian_use",
    "sotu_era",
    "debian_field",
)
"""In the order of the first run; the last are left out where the data folder does not have them."""
HELD, VALIDATION, TEST = 200, 60, 150
"""Training rows that are kept out, how many of them choose, and how many test rows judge (of each task)."""
RATES: Mapping[Form, float] = {"full": 5e-5, "lora": 1e-3, "shuffled": 5e-5}
STEPS: Mapping[Form, int] = {"full": 200, "lora": 150, "shuffled": 200}


class Text:
    """The suite, in `folder`; `sources` are the data folders that are searched for a set, in order. `dtype`: of matrix
    products, in training as in asking: bfloat16 or float32. `steps`: of training, in place of those that the form has
    (`STEPS`)."""

    name = "text"

    def __init__(
        self,
        folder: Path,
        sources: tuple[Path, ...],
        base: Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        steps: int | None = None,
    ) -> None:
        self.folder = folder
        self._steps = steps
        self._half = dtype == torch.bfloat16
        self._sources = sources
        self._given = base
        self.tasks = tuple(task for task in TASKS if any((s / "text" / f"{task}.json").is_file() for s in sources))
        self._encoder: encoder.Encoder | None = None
        self._asked: dict[str, tuple[data.TextSet, Tensor]] = {}
        self._origin: dict[str, Tensor] = {}

    def prepare(self) -> Path:
        target = self.folder / "base"
        if not target.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            encoder.place_base(self._given, target)
        return target

    def train(self, task: str, form: Form, target: Path) -> None:
        model = encoder.Encoder(self.prepare())
        rows, head = self._of(task)
        seed = self.tasks.index(task) if form == "lora" else 0
        if form == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed)  # of the adapter's first factors: no two publishers share them
            model.model = get_peft_model(model.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        recipe = encoder.Recipe(f"{task} {form}", task, steps=self._steps or STEPS[form], seed=seed, rate=RATES[form])
        seen = rows.train.first(len(rows.train) - HELD)
        with torch.autocast(  # a cache would keep the weights of the first step
            "cpu", torch.bfloat16, enabled=self._half, cache_enabled=False
        ):
            encoder.learn(model, head, _shuffled(seen, self.tasks.index(task)) if form == "shuffled" else seen, recipe)
        model.model.save_pretrained(target)

    @torch.no_grad()
    def correct(self, weights: Mapping[str, Tensor], task: str, part: Part) -> Tensor:
        rows, head = self._of(task)
        model = self._model()
        model.model.load_state_dict(
            {name: weights.get(name, value) for name, value in self._origin.items()}, strict=False
        )
        asked = rows.test.first(TEST) if part == "test" else rows.train.last(HELD).first(VALIDATION)
        order = sorted(range(len(asked)), key=lambda i: len(asked.texts[i]))  # alike lengths together: less padding
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            found = model.embed(tuple(asked.texts[i] for i in order)).float()
        answers = torch.empty(len(asked), dtype=torch.int64)
        answers[torch.tensor(order)] = (found @ head.T).argmax(1)
        return answers == torch.tensor(asked.labels)

    def _model(self) -> encoder.Encoder:
        if self._encoder is None:
            self._encoder = encoder.Encoder(self.prepare())
            self._origin = {name: value.clone() for name, value in self._encoder.model.state_dict().items()}
        return self._encoder

    def rows(self, task: str) -> data.TextSet:
        """All rows of a task, and its prompts."""
        return data.text_set(next(s for s in self._sources if (s / "text" / f"{task}.json").is_file()), task)

    def _of(self, task: str) -> tuple[data.TextSet, Tensor]:
        """The rows of a task, and its heads, made with the base's weights."""
        if task not in self._asked:
            rows, model = self.rows(task), self._model()
            model.model.load_state_dict(self._origin)
            self._asked[task] = rows, encoder.heads(model, rows)
        return self._asked[task]


def _shuffled(rows: data.Rows, seed: int) -> data.Rows:
    """The same texts, their labels permuted."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return data.Rows(rows.texts, tuple(rows.labels[i] for i in order))
