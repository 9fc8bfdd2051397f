"""What an objective is: a model in memory, calibration rows, and what is good. Whose weights are in the model, an
objective does not know.

To add one: a subclass of `Objective` in a module of its own, and its place in the list in `builtin`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.objectives.rows import Example, read_rows

T = TypeVar("T")


class RowFiles(Protocol):
    """The files of one task: rows (JSONL), and prompts of its classes (JSON) for an objective that takes them. `batch`
    rows are looked at at a time."""

    @property
    def file(self) -> str | Path: ...

    @property
    def heads(self) -> str | Path | None: ...

    @property
    def batch(self) -> int: ...


class Batch(NamedTuple):
    """Rows side by side. `ids` and `mask` (int64, rows × tokens) are padded on the right; `labels` (int64, rows) has
    the class of each row, -1 where rows have none."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class LoadedModel(NamedTuple):
    """A transformers model (a `torch.nn.Module` with a `config`), and its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device


class Objective(ABC):
    """A model, and `count` rows that were turned into tokens for it. It has a score, higher being better, and of each
    row a loss that can be differentiated. Several objectives may share one model.

    Deterministic: batches are of rows of like length, in order of length, then of line. `lengths` and `lines` are each
    row's number of tokens, and its line in the file.
    """

    name: ClassVar[str]
    """What users call it."""
    auto: ClassVar[str]
    """The class of transformers that loads the model."""
    tokens: ClassVar[int] = 512
    """Texts are cut at so many tokens, or at what the model takes if that is less."""
    labelled: ClassVar[bool] = True
    """Whether rows have a label."""
    prompted: ClassVar[bool] = False
    """Whether it takes a file of prompts (`heads`)."""
    least: ClassVar[int] = 1
    """Tokens that a text needs."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of weights that it does not look at: a model may lack these."""

    def __init__(self, loaded: LoadedModel, files: RowFiles, *, labels: bool = True) -> None:
        """Without `labels` those of the rows are not looked at. Raises Misconfigured naming the file and line of a row
        that cannot be used."""
        self.model, self._tokenizer, self.device = loaded
        config = self.model.config
        limits = (self.tokens, self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        self._longest = min(limit for limit in limits if isinstance(limit, int) and limit > 0)
        pad = self._tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else self._tokenizer.eos_token_id or 0
        if config.pad_token_id is None:
            config.pad_token_id = self._pad
        self._batch = files.batch
        labelled = self.labelled and labels
        rows = read_rows(files.file, labelled=labelled)
        self.prepare(files)
        self._labels = [self.label_of(row, files.file) if labelled else -1 for row in rows]
        self._ids = self.seen(rows, files.file)
        self.count = len(rows)
        self.lengths = [len(ids) for ids in self._ids]
        self.lines = [row.line for row in rows]

    def prepare(self, files: RowFiles) -> None:  # noqa: B027 - most need nothing
        """Makes what an objective needs besides rows, while the model still is the base. Raises Misconfigured for files
        that cannot be used."""

    def label_of(self, row: Example, file: str | Path) -> int:  # noqa: ARG002 - for those whose rows have classes
        """The class of a row, -1 where rows have none. Raises Misconfigured naming the line."""
        return -1

    def seen(self, rows: Sequence[Example], file: str | Path) -> list[list[int]]:
        """Token numbers of what the model is given of each row. Raises Misconfigured naming the line."""
        found = self.encode([row.text for row in rows])
        if short := next((row for row, ids in zip(rows, found, strict=True) if len(ids) < self.least), None):
            raise Misconfigured(f"{file}, line {short.line}: the text has fewer than {self.least} tokens")
        return found

    @abstractmethod
    def losses(self, rows: Sequence[int]) -> Tensor:
        """The loss of each of these rows, side by side in one batch, under the model's present weights: float, 1-D,
        differentiable."""

    @abstractmethod
    def score(self) -> float:
        """What the model is worth now."""

    def shares(self) -> list[float]:
        """How much each row counts in the loss of all."""
        return [1.0 / self.count] * self.count

    def backward(self) -> float:
        """The loss of all rows under the model's present weights, and its gradient in the parameters' `grad`: None
        where it does not depend on one. The activations of one batch are in memory at a time."""
        self.model.zero_grad(set_to_none=True)
        shares, total = self.shares(), []
        for rows in chunks(in_order(self.lengths), self._batch):
            mine = torch.tensor([shares[row] for row in rows], dtype=torch.float64, device=self.device)
            loss = (self.losses(rows).double() * mine).sum()
            total.append(float(loss.detach()))
            loss.backward()  # type: ignore[no-untyped-call]
        return math.fsum(total)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, cut at the longest that the model takes."""
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
        """All rows in order of length, a batch at a time."""
        for rows in chunks(in_order(self.lengths), self._batch):
            yield self.together(rows)


def in_order(lengths: Sequence[int]) -> list[int]:
    """The numbers of the rows in order of length; those of one length as they come."""
    return sorted(range(len(lengths)), key=lambda i: (lengths[i], i))


def chunks(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`size` rows at a time; the last chunk may have fewer."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
