"""Objectives: a transformers model, calibration rows, and what is good. Runs the model; whose weights are in it is not known here.

An objective has a score (higher is better) and the mean loss that belongs to it, in parts that can be differentiated one after the other.
The whole model is in memory. transformers is an optional extra.
"""

from __future__ import annotations

import contextlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from continual.errors import Misconfigured

TEMPERATURE = 0.05
"""What cosines to class heads are divided by before the softmax of their loss; no part of the score."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Which objective, on the rows of which file. `heads` is a JSON file of label to prompts, for `heads` alone."""

    name: str
    file: Path
    heads: Path | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise Misconfigured(f"objective {self.name!r}: use one of {', '.join(OBJECTIVES)}")
        if self.batch < 1:
            raise Misconfigured(f"batch = {self.batch}: at least 1")
        if (self.heads is not None) != (self.name == "heads"):
            raise Misconfigured("the objective heads takes a file of prompts (--heads FILE.json), the others take none")


class Row(NamedTuple):
    """A line of a file of calibration rows."""

    line: int
    text: str
    label: str | int | None


class Batch(NamedTuple):
    """Rows side by side: `ids` and `mask` are rows × tokens, padded on the right; `labels` has a class for each row, -1 where there are none."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Part(NamedTuple):
    """What a batch adds: its loss summed over `total` predictions (differentiable), of which `right` were right."""

    loss: Tensor
    total: int
    right: int


class Objective(ABC):
    """A model and rows that were turned into tokens for it. Deterministic: batches are of rows of like length, in order of length, then of line."""

    name: ClassVar[str]
    auto: ClassVar[str]
    tokens: ClassVar[int] = 512
    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 1

    def __init__(self, model: Any, tokenizer: Any, ask: Ask, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._tokenizer = tokenizer
        limits = (self.tokens, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
        self._longest = min(limit for limit in limits if isinstance(limit, int) and limit > 0)
        pad = tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else tokenizer.eos_token_id or 0
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._pad
        self._batch = ask.batch
        rows = read_rows(ask.file, labelled=self.labelled)
        self.prepare(ask)
        labels = [self.label_of(row, ask.file) for row in rows]
        found = self.encode([row.text for row in rows])
        if short := next((row for row, ids in zip(rows, found, strict=True) if len(ids) < self.least), None):
            raise Misconfigured(f"{ask.file}, line {short.line}: the text has fewer than {self.least} tokens")
        self._batches = self.batches(found, labels)
        self.count = sum(self.predictions(ids) for ids in found)

    def prepare(self, ask: Ask) -> None:  # noqa: B027 - most need nothing
        """What an objective needs besides rows, while the model still is the base."""

    def label_of(self, row: Row, file: Path) -> int:  # noqa: ARG002 - for those whose rows have classes
        """The class of a row, -1 where rows have none. Raises Misconfigured naming the line."""
        return -1

    def predictions(self, ids: Sequence[int]) -> int:
        """How many predictions a row is."""
        return len(ids[:1])

    @abstractmethod
    def part(self, batch: Batch) -> Part:
        """The loss on a batch, differentiable, and how many predictions were right."""

    def losses(self) -> Iterator[Tensor]:
        """The mean loss over all rows, a batch's share at a time: their sum is the mean, and each can be differentiated before the next is made."""
        for batch in self._batches:
            yield self.part(batch).loss / self.count

    def score(self) -> float:
        """What the model is worth now: the share of rows that are right."""
        with torch.inference_mode():
            return sum(self.part(batch).right for batch in self._batches) / self.count

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, cut at the longest the model takes."""
        return [list(self._tokenizer(text, truncation=True, max_length=self._longest)["input_ids"]) for text in texts]

    def batches(self, rows: Sequence[Sequence[int]], labels: Sequence[int]) -> list[Batch]:
        """Rows in order of length, so many at a time."""
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        found = []
        for start in range(0, len(order), self._batch):
            some = order[start : start + self._batch]
            ids = torch.full((len(some), max(len(rows[i]) for i in some)), self._pad)
            mask = torch.zeros_like(ids)
            for k, i in enumerate(some):
                ids[k, : len(rows[i])] = torch.tensor(rows[i])
                mask[k, : len(rows[i])] = 1
            found.append(Batch(ids.to(self.device), mask.to(self.device), torch.tensor([labels[i] for i in some], device=self.device)))
        return found


class CausalLM(Objective):
    """The next token: the score is minus the mean loss per token."""

    name, auto, labelled, least = "causal-lm", "AutoModelForCausalLM", False, 2

    def predictions(self, ids: Sequence[int]) -> int:
        """Every token but the first."""
        return len(ids) - 1

    def part(self, batch: Batch) -> Part:
        """Cross-entropy of every token given those before it."""
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        wanted = batch.ids[:, 1:].masked_fill(batch.mask[:, 1:] == 0, -100)
        loss = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), wanted.reshape(-1), ignore_index=-100, reduction="sum"
        )
        return Part(loss, int(batch.mask[:, 1:].sum()), int((logits.argmax(-1) == wanted).sum()))

    def score(self) -> float:
        """Minus the mean loss."""
        with torch.inference_mode():
            return -math.fsum(float(self.part(batch).loss) for batch in self._batches) / self.count


class Classification(Objective):
    """The classes of a model with a classification head: the score is the accuracy."""

    name, auto = "classification", "AutoModelForSequenceClassification"

    def label_of(self, row: Row, file: Path) -> int:
        """A class's number, or its name in the model's configuration."""
        named: Mapping[str, int] = self.model.config.label2id or {}
        found = named.get(row.label) if isinstance(row.label, str) else row.label
        if found is None or not 0 <= found < self.model.config.num_labels:
            known = ", ".join(sorted(named)) or f"0 to {self.model.config.num_labels - 1}"
            raise Misconfigured(f"{file}, line {row.line}: the model has no class {row.label!r}; it has {known}")
        return found

    def part(self, batch: Batch) -> Part:
        """Cross-entropy of the class."""
        return _classes(self.model(input_ids=batch.ids, attention_mask=batch.mask).logits, batch.labels)


class Heads(Objective):
    """An encoder and frozen class heads, each the normalised mean of the base's embeddings of the class's prompts: the score is the accuracy of the nearest."""

    name, auto, tokens = "heads", "AutoModel", 128

    def prepare(self, ask: Ask) -> None:
        """The heads, of the base."""
        assert ask.heads is not None
        prompts = read_heads(ask.heads)
        self._numbers = {label: number for number, label in enumerate(prompts)}
        with torch.inference_mode():
            rows = [self.encode(texts) for texts in prompts.values()]
            means = [torch.cat([self.embed(b) for b in self.batches(some, [-1] * len(some))]).mean(0) for some in rows]
            heads = functional.normalize(torch.stack(means), dim=-1)
        self._heads = heads.clone()  # classes × width

    def label_of(self, row: Row, file: Path) -> int:
        """A label of the file of prompts."""
        if str(row.label) not in self._numbers:
            raise Misconfigured(
                f"{file}, line {row.line}: no prompts for the label {row.label!r}; there are some for {', '.join(self._numbers)}"
            )
        return self._numbers[str(row.label)]

    def embed(self, batch: Batch) -> Tensor:
        """rows × width: the normalised mean of the last hidden states."""
        states = self.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state.float()
        mask = batch.mask.unsqueeze(-1)
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def part(self, batch: Batch) -> Part:
        """Cross-entropy of the cosines to the heads over the temperature."""
        return _classes(self.embed(batch) @ self._heads.T / TEMPERATURE, batch.labels)


OBJECTIVES: Mapping[str, type[Objective]] = {kind.name: kind for kind in (CausalLM, Classification, Heads)}


def load(ask: Ask, directory: Path, device: torch.device) -> Objective:
    """The objective on the model in `directory`, in float32 on `device`. Nothing is downloaded and no code of the model's is run.

    Raises Misconfigured where transformers is missing or cannot load the model, and for rows that cannot be used, naming the line.
    """
    kind = OBJECTIVES[ask.name]
    try:
        import transformers
    except ImportError:
        raise Misconfigured("objectives run the model with transformers: pip install 'continual[evaluate]'") from None
    local = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
            made = getattr(transformers, kind.auto).from_pretrained(directory, use_safetensors=True, output_loading_info=True, **local)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Misconfigured(
                f"{directory}: transformers cannot load it with {kind.auto} for the objective {ask.name}: {first}"
            ) from None
    model, told = made
    drawn = sorted(n for n in told["missing_keys"] if not (ask.name == "heads" and "pooler." in n))  # heads do not look at a pooler
    if drawn:
        raise Misconfigured(
            f"{directory} has no {drawn[0]}, which {kind.auto} then draws at random: it is no model for the objective {ask.name}"
        )
    return kind(model.float().to(device).eval(), tokenizer, ask, device)


def read_rows(file: Path, *, labelled: bool) -> list[Row]:
    """The rows of a JSONL file; empty lines are passed over. Raises Misconfigured naming the line and what is wrong with it."""
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            body = json.loads(line)
        except ValueError as error:
            raise Misconfigured(f"{where}: no JSON ({error})") from None
        if not isinstance(body, dict) or not isinstance(body.get("text"), str):
            raise Misconfigured(f'{where}: write an object with a text, as {{"text": "…", "label": "…"}}')
        label = body.get("label")
        if labelled and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise Misconfigured(f"{where}: {'no label' if label is None else f'the label is {label!r}'}; it has to be a name or a number")
        rows.append(Row(number, body["text"], label if labelled else None))
    if not rows:
        raise Misconfigured(f"{file}: no row in it")
    return rows


def read_heads(file: Path) -> dict[str, list[str]]:
    """Label to prompts. Raises Misconfigured saying what is wrong."""
    try:
        body = json.loads(_text(file))
    except ValueError as error:
        raise Misconfigured(f"{file}: no JSON ({error})") from None
    if not isinstance(body, dict) or len(body) < 2:
        raise Misconfigured(f"{file}: write an object of at least two labels, each with a list of prompts")
    for label, prompts in body.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise Misconfigured(f"{file}: the label {label!r} needs a list of prompts")
    return body


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise Misconfigured(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{file}: not UTF-8 ({error})") from None


def _classes(logits: Tensor, labels: Tensor) -> Part:
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return Part(loss, len(labels), int((logits.argmax(-1) == labels).sum()))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Loading without bars and reports, which are not for who asked for a score."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
