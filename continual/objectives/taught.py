"""Rows without labels, of which a model that serves them says what is right: the loss of a row is how far what the
model in memory predicts is from what that teacher predicted (Hinton et al. 2015, "Distilling the Knowledge in a Neural
Network", equation 1 at temperature 1; for merges the idea of Zhang et al. 2025, "Expert Merging: Model Merging with
Unsupervised Expert Alignment and Importance-Guided Layer Chunking", which has hidden states, too)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from blake3 import blake3

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch

KEPT = 64
"""Of so many classes or tokens, the likeliest by the teacher, its probabilities are kept, and of all others the sum: a
vocabulary has too many."""
_LEAST = 1e-6
"""A probability of all others that is less counts as this much: the rest of 1 is known no better in float32."""


class Said(NamedTuple):
    """What a model says of some rows. `logits`: float, predictions × classes. `rows`: int64, of each prediction the
    place of its row among those asked, in order."""

    logits: Tensor
    rows: Tensor


@runtime_checkable
class TellingTask(Protocol):
    """A task whose model can be asked what it predicts, without labels."""

    count: int

    def says(self, rows: Sequence[int]) -> Said:
        """What the model predicts of these rows under its present weights, differentiable."""
        ...


class Taught:
    """The rows of a task, to be compared with what a teacher says of them. `learn` comes first."""

    def __init__(self, of: TellingTask) -> None:
        self._of = of
        self.count = of.count
        self._taught: dict[int, tuple[Tensor, Tensor]] = {}

    def learn(self, rows: Sequence[int], by: Taught) -> None:
        """Keeps what the model of `by`, of the same task, says of these rows now."""
        said = by._of.says(rows)
        logs = said.logits.detach().float().log_softmax(-1)
        top = logs.topk(min(KEPT, logs.shape[-1]), -1)
        for place, row in enumerate(rows):
            mine = said.rows == place
            self._taught[row] = top.indices[mine], top.values[mine]

    def known(self, rows: Sequence[int]) -> list[int]:
        """Those of these rows of which anything was predicted."""
        return [row for row in rows if len(self._taught[row][0])]

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Of each row the mean over its predictions of KL(teacher, model), in nats, float32, 1-D. What is not kept
        counts as one class, so that it is never more than that of all classes. Raises Misconfigured where there is
        another number of predictions than the teacher had."""
        said = self._of.says(rows)
        places, wanted = (torch.cat([self._taught[row][part] for row in rows]) for part in (0, 1))
        counts = torch.tensor([len(self._taught[row][0]) for row in rows], device=said.rows.device)
        if not torch.equal(said.rows, torch.arange(len(rows), device=said.rows.device).repeat_interleave(counts)):
            raise Misconfigured(
                "a teacher predicted other tokens of these rows than the model: it has another tokenizer"
            )
        logs = said.logits.float().log_softmax(-1).gather(-1, places)
        found = (wanted.exp() * (wanted - logs)).sum(-1)
        if wanted.shape[-1] < said.logits.shape[-1]:
            rest, mine = ((1.0 - kept.exp().sum(-1)).clamp(min=_LEAST) for kept in (wanted, logs))
            found = found + rest * (rest / mine).log()
        return torch.zeros(len(rows), device=found.device).index_add(0, said.rows, found) / counts

    @property
    def digest(self) -> str:
        """Of all that was learned."""
        hashed = blake3()
        for row in sorted(self._taught):
            for part in self._taught[row]:
                hashed.update(part.contiguous().cpu().numpy().tobytes())
        return f"blake3:{hashed.hexdigest()}"
