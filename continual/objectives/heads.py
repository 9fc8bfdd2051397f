"""The objective `heads`: an encoder, and class heads that are made of prompts and then stay as they are."""

from __future__ import annotations

from pathlib import Path

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.objectives.classes import Classes
from continual.objectives.contract import Batch, RowFiles, chunks
from continual.objectives.rows import Example, read_heads

TEMPERATURE = 0.05
"""Cosines to class heads are divided by this before the softmax of their loss. It is no part of the score."""


class Heads(Classes):
    """A class head is the normalised mean of the base's embeddings of the prompts of the class. The score is the
    accuracy of the nearest head."""

    name = "heads"
    auto = "AutoModel"
    tokens = 128
    prompted = True
    unused = ("pooler.",)

    def prepare(self, files: RowFiles) -> None:
        """Makes the heads, of the base. Raises Misconfigured for a file of prompts that cannot be used."""
        assert files.heads is not None
        prompts = read_heads(files.heads)
        self._numbers = {label: number for number, label in enumerate(prompts)}
        with torch.inference_mode():
            heads = torch.nn.functional.normalize(
                torch.stack([self._mean(texts) for texts in prompts.values()]), dim=-1
            )
        self._heads = heads.clone()  # classes × width; no inference tensor, so that losses can be differentiated

    def _mean(self, texts: list[str]) -> Tensor:
        """The mean of the embeddings of some texts: width."""
        ids = sorted(self.encode(texts), key=len)
        each = [self.embed(self.padded(some, [-1] * len(some))) for some in chunks(ids, self._batch)]
        return torch.cat(each).mean(0)

    def label_of(self, row: Example, file: str | Path) -> int:
        """The number of a label of the file of prompts. Raises Misconfigured naming the line."""
        if str(row.label) not in self._numbers:
            raise Misconfigured(
                f"{file}, line {row.line}: no prompts for the label {row.label!r}; "
                f"there are some for {', '.join(self._numbers)}"
            )
        return self._numbers[str(row.label)]

    def embed(self, batch: Batch) -> Tensor:
        """The normalised mean of the last hidden states, float32, rows × width."""
        states = self.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state.float()
        mask = batch.mask.unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def logits(self, batch: Batch) -> Tensor:
        """The cosines to the heads over the temperature, never in less than float32; rows × classes."""
        found = self.embed(batch)
        with torch.autocast(self.device.type, enabled=False):
            return found @ self._heads.T / TEMPERATURE
