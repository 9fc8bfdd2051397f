"""Labelled short texts and real adapters for the benchmarks, read from a folder that the user names. No models here,
and no download.

The folder holds `text/NAME.json` (keys: name, classes, prompts, train, test; rows are [text, label index]) and
`adapters/NAME` (LoRA adapters in PEFT layout).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

SETS = ("snips7", "clickbait", "hwu64", "sms_spam", "debian_lang14")
ADAPTERS = ("snips7", "clickbait")


@dataclass(frozen=True)
class Rows:
    """Texts and, in the same order, the indexes of their classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Rows:
        """The first `count` rows, or all."""
        return Rows(self.texts[:count], self.labels[:count])

    def last(self, count: int) -> Rows:
        """The last `count` rows, or all."""
        return Rows(self.texts[-count:], self.labels[-count:])

    def part(self, begin: float, end: float) -> Rows:
        """The rows from share `begin` to share `end`, in order."""
        rows = slice(round(begin * len(self)), round(end * len(self)))
        return Rows(self.texts[rows], self.labels[rows])


@dataclass(frozen=True)
class TextSet:
    """One classification task; `prompts` holds at least one description of each class."""

    name: str
    prompts: tuple[tuple[str, ...], ...]
    train: Rows
    test: Rows


def text_set(folder: Path, name: str) -> TextSet:
    """The set `name` below the data folder. Raises FileNotFoundError, or ValueError for a label that no class has."""
    body = json.loads((folder / "text" / f"{name}.json").read_text())
    prompts = tuple(tuple(of_class) for of_class in body["prompts"])
    parts = [Rows(*(tuple(column) for column in zip(*body[part], strict=True))) for part in ("train", "test")]
    for rows in parts:
        if not all(0 <= label < len(prompts) for label in rows.labels):
            raise ValueError(f"{folder / 'text' / name}.json: a label is not in 0 … {len(prompts) - 1}")
    return TextSet(name, prompts, *parts)


def classes(folder: Path, name: str) -> tuple[str, ...]:
    """The names of the classes of the set `name`. Raises FileNotFoundError."""
    return tuple(json.loads((folder / "text" / f"{name}.json").read_text())["classes"])


def adapter(folder: Path, name: str) -> Path:
    """Directory of the adapter `name`. Raises FileNotFoundError."""
    path = folder / "adapters" / name
    if not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{path}: not an adapter in PEFT layout")
    return path
