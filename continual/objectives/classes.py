"""Objectives whose rows each have one of several classes, and `classification`, that of a model with a classification
head."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.objectives.contract import Batch, Objective, chunks
from continual.objectives.rows import Example
from continual.objectives.taught import Said

WIDEST = math.log(10)
"""How far from 1 a fitted confidence may go, as a logarithm, up or down: of rows that are all right it would go up for
ever."""


class Classes(Objective):
    """The score is the share of rows that are right; the loss of a row is its cross-entropy.

    `confidence` multiplies the logits in the losses. By itself it is 1; `fit` takes the one under which the mean loss
    of some rows is least. Why: a model merged of many is often too sure of itself, and then any model that makes it
    less sure lowers the plain loss, one trained on noise as much as another. By the envelope theorem, the gradient of
    the fitted loss is that of `losses` with the confidence held.
    """

    confidence = 1.0

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Float, rows × classes."""

    def says(self, rows: Sequence[int]) -> Said:
        """The logits of these rows, at a confidence of 1."""
        return Said(self.logits(self.together(rows)), torch.arange(len(rows), device=self.device))

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Cross-entropy of each row's class, float64, 1-D."""
        batch = self.together(rows)
        return torch.nn.functional.cross_entropy(
            self.confidence * self.logits(batch).double(), batch.labels, reduction="none"
        )

    def fit(self, rows: Sequence[int]) -> Tensor:
        """Sets the confidence to the best one on these rows. Returns their losses under it: float64, 1-D, on the CPU,
        without a gradient."""
        found, labels = self._said(rows)
        self.confidence = fitted(found, labels)
        return torch.nn.functional.cross_entropy(self.confidence * found, labels, reduction="none")

    def worth(self, rows: Sequence[int]) -> Tensor:
        """The share of each row in the mean probability of the right class, as `shares_of_right` has it: float64, 1-D,
        on the CPU, without a gradient."""
        return shares_of_right(*self._said(rows))

    def _said(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The logits of rows and their classes, on the CPU, without a gradient."""
        with torch.no_grad():
            found = torch.cat([self.logits(self.together(some)).double().cpu() for some in chunks(rows, self._batch)])
        return found, torch.tensor([self._labels[i] for i in rows])

    def score(self) -> float:
        """The share of rows that are right."""
        with torch.inference_mode():
            right = sum(int((self.logits(batch).argmax(-1) == batch.labels).sum()) for batch in self.batches())
        return right / self.count


class Classification(Classes):
    """The classes of a model with a classification head: the score is the accuracy."""

    name = "classification"
    auto = "AutoModelForSequenceClassification"

    def label_of(self, row: Example, file: str | Path) -> int:
        """A class's number, or its name in the model's configuration. Raises Misconfigured naming the line."""
        named: Mapping[str, int] = self.model.config.label2id or {}
        found = named.get(row.label) if isinstance(row.label, str) else row.label
        if found is None or not 0 <= found < self.model.config.num_labels:
            known = ", ".join(sorted(named)) or f"0 to {self.model.config.num_labels - 1}"
            raise Misconfigured(f"{file}, line {row.line}: the model has no class {row.label!r}; it has {known}")
        return found

    def logits(self, batch: Batch) -> Tensor:
        """The output of the classification head."""
        logits: Tensor = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits


class Entropy:
    """The rows of an objective without their classes: the loss of a row is the entropy of what is predicted for it.
    There is no confidence to fit: the least entropy is 0, of one that is sure of anything."""

    def __init__(self, of: Classes) -> None:
        self._of = of
        self.count = of.count

    def losses(self, rows: Sequence[int]) -> Tensor:
        """The entropy of each row's predicted distribution, float64, 1-D."""
        logs = self._of.logits(self._of.together(rows)).double().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)


def fitted(logits: Tensor, labels: Tensor) -> float:
    """The β from a tenth to ten that minimises the mean cross-entropy of β·`logits` (float64, rows × classes; `labels`
    int64, rows): 1 where the logits say nothing or are not finite.

    The loss is convex in β. So its slope Σ_rows E_p[z − z_label], p = softmax(βz), has one sign before the minimum and
    one after it: bisection on log β.
    """
    own = logits.gather(1, labels[:, None])
    less = logits - own  # against the logit of the row's own class, so that nothing large cancels
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


def shares_of_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row a number: their mean is the mean probability p of the right class under the confidence β that fits
    these rows best (`fitted`), and they scatter as that mean does from one sample of rows to another, the fit included.
    `logits`: float64, rows × classes; `labels`: int64, rows. Float64, rows; a number may lie beyond 0 and 1.

    β is where the mean of ψ = dloss/dβ is zero. A row moves it by -ψ / mean(dψ/dβ), and that moves the mean of p by
    its slope mean(dp/dβ) = -mean(p·ψ): the first term of a sum over rows (Hampel 1974, "The Influence Curve and Its
    Role in Robust Estimation"). At an end of the range β does not move.
    """
    confidence = fitted(logits, labels)
    own = labels[:, None]
    less = logits - logits.gather(1, own)
    each = torch.softmax(confidence * less, -1)
    right = each.gather(1, own).squeeze(1)
    slope = (each * less).sum(-1)
    curve = ((each * less.square()).sum(-1) - slope.square()).mean()
    inside = abs(math.log(confidence)) < WIDEST * (1 - 1e-9)
    if not inside or not bool(less.isfinite().all()) or not float(curve) > 0:
        return right
    return right + (right * slope).mean() * slope / curve
