"""Objectives: a transformers model, calibration rows, and what is good. Runs the model; whose weights are in it is not
known here.

An objective has a score (higher is better), and of each of its rows a loss that can be differentiated. Several may
share one model. The whole model is in memory. transformers is an optional extra.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from continual.errors import Misconfigured
from continual.objectives.rows import Row, read_heads, read_rows

TEMPERATURE = 0.05
"""What cosines to class heads are divided by before the softmax of their loss; no part of the score."""
WIDEST = math.log(10)
"""How far from the objective's own a fitted confidence may go, as a logarithm, up or down: a task whose rows are all
right would go on for ever."""
_T = TypeVar("_T")


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


class Batch(NamedTuple):
    """Rows side by side: `ids` and `mask` are rows × tokens, padded on the right; `labels` has a class for each row, -1
    where there are none."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Loaded(NamedTuple):
    """A transformers model and its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device


class Objective(ABC):
    """A model and `count` rows that were turned into tokens for it. Deterministic: batches are of rows of like length,
    in order of length, then of line.

    `lengths` and `lines` are each row's number of tokens and its line in the file.
    """

    name: ClassVar[str]
    auto: ClassVar[str]
    tokens: ClassVar[int] = 512
    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 1

    def __init__(self, loaded: Loaded, ask: Ask, *, labels: bool = True) -> None:
        """Without `labels` those of the rows are not looked at."""
        self.model, self._tokenizer, self.device = loaded
        limits = (
            self.tokens,
            self._tokenizer.model_max_length,
            getattr(self.model.config, "max_position_embeddings", None),
        )
        self._longest = min(limit for limit in limits if isinstance(limit, int) and limit > 0)
        pad = self._tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else self._tokenizer.eos_token_id or 0
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self._pad
        self._batch = ask.batch
        labelled = self.labelled and labels
        rows = read_rows(ask.file, labelled=labelled)
        self.prepare(ask)
        self._labels = [self.label_of(row, ask.file) if labelled else -1 for row in rows]
        self._ids = self.encode([row.text for row in rows])
        if short := next((row for row, ids in zip(rows, self._ids, strict=True) if len(ids) < self.least), None):
            raise Misconfigured(f"{ask.file}, line {short.line}: the text has fewer than {self.least} tokens")
        self.count = len(rows)
        self.lengths = [len(ids) for ids in self._ids]
        self.lines = [row.line for row in rows]

    def prepare(self, ask: Ask) -> None:  # noqa: B027 - most need nothing
        """What an objective needs besides rows, while the model still is the base."""

    def label_of(self, row: Row, file: Path) -> int:  # noqa: ARG002 - for those whose rows have classes
        """The class of a row, -1 where rows have none. Raises Misconfigured naming the line."""
        return -1

    @abstractmethod
    def losses(self, rows: Sequence[int]) -> Tensor:
        """The loss of each of these rows, side by side in one batch, under the model's present weights; differentiable."""

    @abstractmethod
    def score(self) -> float:
        """What the model is worth now."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, cut at the longest the model takes."""
        return [list(self._tokenizer(text, truncation=True, max_length=self._longest)["input_ids"]) for text in texts]

    def together(self, rows: Sequence[int]) -> Batch:
        """These rows side by side."""
        return self.padded([self._ids[i] for i in rows], [self._labels[i] for i in rows])

    def padded(self, rows: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
        """A batch of these token numbers."""
        ids = torch.full((len(rows), max(map(len, rows))), self._pad)
        mask = torch.zeros_like(ids)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
            mask[k, : len(row)] = 1
        return Batch(ids.to(self.device), mask.to(self.device), torch.tensor(labels, device=self.device))

    def batches(self) -> Iterator[Batch]:
        """All rows in order of length, so many at a time."""
        for rows in chunks(in_order(self.lengths), self._batch):
            yield self.together(rows)


class CausalLM(Objective):
    """The next token: the score is minus the mean loss per token, and a row's loss the mean of its own tokens."""

    name, auto, labelled, least = "causal-lm", "AutoModelForCausalLM", False, 2

    def tokenwise(self, batch: Batch) -> Tensor:
        """rows × (tokens - 1): cross-entropy of every token given those before it, 0 where there is none."""
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        wanted = batch.ids[:, 1:].masked_fill(batch.mask[:, 1:] == 0, -100)
        return functional.cross_entropy(logits.transpose(1, 2).float(), wanted, ignore_index=-100, reduction="none")

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Of each row the mean over its predicted tokens, which are all but the first."""
        batch = self.together(rows)
        return self.tokenwise(batch).sum(1) / batch.mask[:, 1:].sum(1)

    def score(self) -> float:
        """Minus the mean loss per token."""
        with torch.inference_mode():
            total = math.fsum(float(self.tokenwise(batch).sum()) for batch in self.batches())
        return -total / (sum(self.lengths) - self.count)


class Classes(Objective):
    """Rows that each have one of several classes: the score is the share that is right, a row's loss its cross-entropy.

    `confidence` multiplies the logits in the losses. The objective's own is 1; `fit` takes the one under which the mean
    loss of some rows is least. Why: a merge of many models is often too sure of itself, and then any model that makes
    it less sure lowers the plain loss, one trained on noise as much as another. By the envelope theorem the gradient of
    the fitted loss is that of `losses` with the confidence held.
    """

    confidence = 1.0

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """rows × classes."""

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Cross-entropy of each row's class, in float64."""
        batch = self.together(rows)
        return functional.cross_entropy(self.confidence * self.logits(batch).double(), batch.labels, reduction="none")

    def fit(self, rows: Sequence[int]) -> Tensor:
        """Sets the confidence to the best one on these rows, and returns their losses under it (float64, CPU, no
        gradient)."""
        with torch.no_grad():
            found = torch.cat([self.logits(self.together(some)).double().cpu() for some in chunks(rows, self._batch)])
        labels = torch.tensor([self._labels[i] for i in rows])
        self.confidence = fitted(found, labels)
        return functional.cross_entropy(self.confidence * found, labels, reduction="none")

    def score(self) -> float:
        """The share of rows that are right."""
        with torch.inference_mode():
            return (
                sum(int((self.logits(batch).argmax(-1) == batch.labels).sum()) for batch in self.batches()) / self.count
            )


class Classification(Classes):
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

    def logits(self, batch: Batch) -> Tensor:
        """What the classification head says."""
        logits: Tensor = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits


class Heads(Classes):
    """An encoder and frozen class heads, each the normalised mean of the base's embeddings of the class's prompts: the
    score is the accuracy of the nearest."""

    name, auto, tokens = "heads", "AutoModel", 128

    def prepare(self, ask: Ask) -> None:
        """The heads, of the base."""
        assert ask.heads is not None
        prompts = read_heads(ask.heads)
        self._numbers = {label: number for number, label in enumerate(prompts)}
        with torch.inference_mode():
            means = []
            for texts in prompts.values():
                ids = sorted(self.encode(texts), key=len)
                means.append(
                    torch.cat(
                        [self.embed(self.padded(some, [-1] * len(some))) for some in chunks(ids, self._batch)]
                    ).mean(0)
                )
            heads = functional.normalize(torch.stack(means), dim=-1)
        self._heads = heads.clone()  # classes × width; no inference tensor, so that losses can be differentiated

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

    def logits(self, batch: Batch) -> Tensor:
        """The cosines to the heads over the temperature, never in less than float32."""
        found = self.embed(batch)
        with torch.autocast(self.device.type, enabled=False):
            return found @ self._heads.T / TEMPERATURE


class Entropy:
    """The rows of `of` without their classes: a row's loss is the entropy of what is predicted for it. There is no
    confidence to fit: the least is 0."""

    def __init__(self, of: Classes) -> None:
        self._of = of
        self.count = of.count

    def losses(self, rows: Sequence[int]) -> Tensor:
        """The entropy of each row's predicted distribution, in float64."""
        logs = self._of.logits(self._of.together(rows)).double().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)


OBJECTIVES: Mapping[str, type[Objective]] = {kind.name: kind for kind in (CausalLM, Classification, Heads)}


def load(ask: Ask, directory: Path, device: torch.device) -> Objective:
    """The objective on the model in `directory`. Raises as `load_model` does, and Misconfigured for rows that cannot be
    used, naming the line."""
    return OBJECTIVES[ask.name](load_model(ask.name, directory, device), ask)


def load_model(name: str, directory: Path, device: torch.device, *, still: bool = False) -> Loaded:
    """The model in `directory` for the objective `name`, in float32 on `device`. Nothing is downloaded and no code of
    the model's is run.

    `still`: nothing in it is dropped at random, in training mode either. Raises Misconfigured where transformers is
    missing or cannot load the model.
    """
    kind = OBJECTIVES[name]
    try:
        import transformers
    except ImportError:
        raise Misconfigured("objectives run the model with transformers: pip install 'continual[evaluate]'") from None
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
            config = transformers.AutoConfig.from_pretrained(directory, **local)
            if still:
                _stilled(config)
            made = getattr(transformers, kind.auto).from_pretrained(
                directory, config=config, use_safetensors=True, output_loading_info=True, **local
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Misconfigured(
                f"{directory}: transformers cannot load it with {kind.auto} for the objective {name}: {first}"
            ) from None
    found, told = made
    drawn = sorted(
        n for n in told["missing_keys"] if not (name == "heads" and "pooler." in n)
    )  # heads do not look at a pooler
    if drawn:
        raise Misconfigured(
            f"{directory} has no {drawn[0]}, which {kind.auto} then draws at random: it is no model for the objective {name}"
        )
    return Loaded(found.float().to(device).eval(), tokenizer, device)


def fitted(logits: Tensor, labels: Tensor) -> float:
    """The β from a tenth to ten that minimises the mean cross-entropy of β · `logits` (rows × classes, float64): 1
    where they say nothing or are not finite.

    The loss is convex in β, so its slope Σ_rows E_p[z − z_label], p = softmax(βz), has one sign before the minimum and
    one after: bisection on log β.
    """
    less = logits - logits.gather(
        1, labels[:, None]
    )  # rows × classes: against the row's own class, so that nothing large cancels
    if not bool(less.isfinite().all()) or not bool(less.any()):
        return 1.0

    def rising(exponent: float) -> bool:
        return bool((torch.softmax(math.exp(exponent) * less, -1) * less).sum() > 0)

    low, high = -WIDEST, WIDEST
    if rising(low):
        return math.exp(low)
    if not rising(high):
        return math.exp(high)
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if rising(middle) else (middle, high)
    return math.exp(middle)


def in_order(lengths: Sequence[int]) -> list[int]:
    """Rows in order of length, then as they come."""
    return sorted(range(len(lengths)), key=lambda i: (lengths[i], i))


def chunks(rows: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """`size` rows after the other; the last may be fewer."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _stilled(config: Any) -> None:
    """Sets every rate of dropout to 0, in the configurations within this one too. None may stand for another's, so it
    becomes 0 as well."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _stilled(value)
        elif "drop" in key and (value is None or isinstance(value, float)):
            setattr(config, key, 0.0)


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
