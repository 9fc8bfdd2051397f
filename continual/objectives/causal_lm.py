"""The objective `causal-lm`: predicting the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.objectives.contract import Batch, Objective, chunks, in_order
from continual.objectives.rows import Example
from continual.objectives.taught import Said

_IGNORED = -100


class CausalLM(Objective):
    """The score is minus the mean loss per token; the loss of a row is the mean of its own tokens. Of a row with a
    prompt the tokens of the text after it are looked at alone, and `prompts` says the others."""

    name = "causal-lm"
    auto = "AutoModelForCausalLM"
    labelled = False
    least = 2

    def seen(self, rows: Sequence[Example], file: str | Path) -> list[list[int]]:
        """The prompt and the text behind it. What the tokenizer puts behind every text stands behind both."""
        texts = iter(super().seen([row for row in rows if not row.prompt], file))
        self._prompts, found = list[int](), list[list[int]]()
        for row in rows:
            prompt, end = self._opened(row.prompt) if row.prompt else ([], [])
            answer = [*self._bare(row.text), *end] if row.prompt else next(texts)
            ids = [*prompt, *answer][: self._longest]
            if row.prompt and (not prompt or len(ids) <= len(prompt) or len(answer) == len(end)):
                raise Misconfigured(
                    f"{file}, line {row.line}: prompt and text need a token each, within {self._longest} together"
                )
            self._prompts.append(len(prompt))
            found.append(ids)
        return found

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _opened(self, prompt: str) -> tuple[list[int], list[int]]:
        """A text up to its last token, and what the tokenizer puts behind it."""
        ids, bare = list(self._tokenizer(prompt)["input_ids"]), self._bare(prompt)
        ends = range(len(ids), len(bare) - 1, -1)
        end = next((end for end in ends if ids[end - len(bare) : end] == bare), len(ids))
        return ids[:end], ids[end:]

    def _wanted(self, rows: Sequence[int], batch: Batch) -> Tensor:
        """The token that has to follow each but the last, rows × (tokens - 1); `_IGNORED` where none does."""
        behind = torch.tensor([self._prompts[row] for row in rows], device=batch.ids.device)[:, None]
        places = torch.arange(1, batch.ids.shape[1], device=batch.ids.device)
        return batch.ids[:, 1:].masked_fill((batch.mask[:, 1:] == 0) | (places < behind), _IGNORED)

    def _tokenwise(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every token that is wanted, given those before it, float32, rows × (tokens - 1), 0 where
        there is none; and how many there are of each row."""
        batch = self.together(rows)
        wanted = self._wanted(rows, batch)
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        found = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), wanted, ignore_index=_IGNORED, reduction="none"
        )
        return found, (wanted != _IGNORED).sum(1)

    def says(self, rows: Sequence[int]) -> Said:
        """What it predicts for every token of these rows that is wanted."""
        batch = self.together(rows)
        return self._said(batch, self._wanted(rows, batch) != _IGNORED)

    def prompts(self, rows: Sequence[int]) -> Said:
        """What it predicts for every token of their prompts but the first."""
        batch = self.together(rows)
        behind = torch.tensor([self._prompts[row] for row in rows], device=batch.ids.device)[:, None]
        return self._said(batch, torch.arange(1, batch.ids.shape[1], device=batch.ids.device) < behind)

    def _said(self, batch: Batch, where: Tensor) -> Said:
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        return Said(logits[where], where.nonzero()[:, 0])

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Of each row the mean over its predicted tokens: all but the first, or those of its answer. float32, 1-D."""
        found, counts = self._tokenwise(rows)
        return found.sum(1) / counts

    def counts(self) -> list[int]:
        """How many tokens of each row are predicted."""
        return [length - max(1, prompt) for length, prompt in zip(self.lengths, self._prompts, strict=True)]

    def shares(self) -> list[float]:
        """By its predicted tokens, so that the loss of all is minus the score."""
        counts = self.counts()
        return [count / sum(counts) for count in counts]

    def score(self) -> float:
        """Minus the mean loss per token."""
        with torch.inference_mode():
            together = chunks(in_order(self.lengths), self._batch)
            total = math.fsum(float(self._tokenwise(rows)[0].sum()) for rows in together)
        return -total / sum(self.counts())
