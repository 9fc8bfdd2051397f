"""The objective `causal-lm`: predicting the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from continual.lazily import Tensor, torch
from continual.objectives.contract import Batch, Objective
from continual.objectives.taught import Said


class CausalLM(Objective):
    """The score is minus the mean loss per token; the loss of a row is the mean of its own tokens."""

    name = "causal-lm"
    auto = "AutoModelForCausalLM"
    labelled = False
    least = 2

    def tokenwise(self, batch: Batch) -> Tensor:
        """Cross-entropy of every token given those before it, float32, rows × (tokens - 1); 0 where there is none."""
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        wanted = batch.ids[:, 1:].masked_fill(batch.mask[:, 1:] == 0, -100)
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), wanted, ignore_index=-100, reduction="none"
        )

    def says(self, rows: Sequence[int]) -> Said:
        """What it predicts for every token of these rows but the first."""
        batch = self.together(rows)
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        where = batch.mask[:, 1:] != 0
        return Said(logits[where], where.nonzero()[:, 0])

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Of each row the mean over its predicted tokens: all but the first. float32, 1-D."""
        batch = self.together(rows)
        return self.tokenwise(batch).sum(1) / batch.mask[:, 1:].sum(1)

    def shares(self) -> list[float]:
        """By its predicted tokens, so that the loss of all is minus the score."""
        tokens = sum(self.lengths) - self.count
        return [(length - 1) / tokens for length in self.lengths]

    def score(self) -> float:
        """Minus the mean loss per token."""
        with torch.inference_mode():
            total = math.fsum(float(self.tokenwise(batch).sum()) for batch in self.batches())
        return -total / (sum(self.lengths) - self.count)
