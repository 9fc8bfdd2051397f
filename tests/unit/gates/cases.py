"""What the tests of the gates share: a gate beside something that it refuses, and models that stand as candidates.

Each test module of a gate has `REFUSED`: a case for every reason of the gate, made in an empty directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from continual.gates import Gate, Headers, Numbers, TensorNumbers
from continual.tensors import BaseModel, Checkpoint, candidate_of, describe, open_model, release_of
from tests.helpers import models

Change = Callable[[dict[str, torch.Tensor]], None]


class Case(NamedTuple):
    """A gate and what it is asked about."""

    gate: Gate
    seen: Headers | TensorNumbers | Numbers

    def judge(self) -> object:
        """What the gate says. Raises Refuse."""
        return self.gate.judge(self.seen)  # type: ignore[attr-defined]


def headers(
    base: Path, model: Path, *, root: Path | None = None, state: str = "ours", earlier: int | None = None
) -> Headers:
    """A candidate against a base, as the engine shows it to the gates."""
    origin = open_model(base)
    assert isinstance(origin, Checkpoint)
    opened = open_model(model, root=root)
    release = release_of(opened.place)
    return Headers(candidate_of(opened), opened, describe(origin), state, release=release, earlier=earlier)


def fine_tune(place: Path, change: Change | None = None) -> Headers:
    """A fine-tune of the small base of all tests; `change` may do to its tensors what the case is about."""
    base = models.base(place / "base")
    return headers(base, models.fine_tune(base, place / "alice", 1, change=change))


def save(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> Path:
    """A model directory of these tensors, of which some may share their memory."""
    return models.write(path, {name: tensor.clone() for name, tensor in tensors.items()}, config)


@contextmanager
def described(directory: Path) -> Iterator[BaseModel]:
    """The base in a directory, while the block runs."""
    with open_model(directory) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        yield describe(checkpoint)
