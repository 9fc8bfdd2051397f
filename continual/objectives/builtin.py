"""The objectives there are, by name, and how one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from continual.errors import Misconfigured
from continual.lazily import torch
from continual.objectives.causal_lm import CausalLM
from continual.objectives.classes import Classification
from continual.objectives.contract import Objective
from continual.objectives.heads import Heads
from continual.objectives.loading import load_model

OBJECTIVES: Mapping[str, type[Objective]] = {kind.name: kind for kind in (CausalLM, Classification, Heads)}


@dataclass(frozen=True, slots=True)
class Rows:
    """Which objective (`name`), on the rows of which JSONL file, `batch` rows at a time. `heads` is a JSON file of
    label to prompts, for the objective `heads` alone.

    Raises Misconfigured for an objective that there is not, and for files that it does not take.
    """

    name: str
    file: str | Path
    heads: str | Path | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise Misconfigured(f"objective {self.name!r}: use one of {', '.join(OBJECTIVES)}")
        if self.batch < 1:
            raise Misconfigured(f"batch = {self.batch}: at least 1")
        if (self.heads is not None) != OBJECTIVES[self.name].prompted:
            raise Misconfigured("the objective heads takes a file of prompts (--heads FILE.json), the others take none")


def load(rows: Rows, directory: Path, device: torch.device) -> Objective:
    """The objective that `rows` names, on the model in `directory`. Raises Misconfigured for a model that cannot be
    loaded, and for rows that cannot be used, naming the line."""
    kind = OBJECTIVES[rows.name]
    return kind(load_model(kind, directory, device), rows)
