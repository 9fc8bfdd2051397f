"""Which models a merge has, and with which weight each is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from continual.engine.block_reading import BlockReading
from continual.engine.reading import Reading
from continual.state.ledger import weights_at

_LISTED = 100_000


class ModelRead(NamedTuple):
    """A model of a merge: its name, the record of its fold, its key and content digest; `weight`: what it is read with,
    None where nobody knows."""

    name: str
    seq: int
    key: str
    digest: str
    weight: float | None


def models_read(reading: Reading) -> tuple[ModelRead, ...]:
    """The models that a reading has, in the order of their folds. A model that a round weighed by layer has the mean of
    these weights."""
    ledger, seq = reading.state.ledger, reading.commit.seq
    weighed = weights_at(ledger, seq) or {}
    found = []
    for fold in ledger.folds(at=seq):
        key, numbers = fold.entry.candidate.key, fold.entry.numbers
        if isinstance(reading, BlockReading):
            if numbers.block not in reading.chosen:
                continue
            weight = reading.chosen[numbers.block]
        else:
            mine = weighed.get(key)
            given = 1.0 if numbers.weight is None else numbers.weight
            weight = sum(mine) / len(mine) if mine else given
        found.append(ModelRead(fold.entry.candidate.name, fold.seq, key, fold.entry.digest, weight))
    return tuple(found)


def models_said(release: Mapping[str, object] | None) -> tuple[ModelRead, ...] | None:
    """The models that the `continual.json` of an export lists, which is text from outside; None where it lists none."""
    rows = None if release is None else release.get("folded")
    if not isinstance(rows, list) or len(rows) > _LISTED:
        return None
    found = []
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("name", "key", "digest")):
            return None
        seq, weight = row.get("seq"), row.get("weight")
        known = isinstance(weight, int | float) and math.isfinite(weight)
        number = seq if isinstance(seq, int) else -1
        found.append(ModelRead(row["name"], number, row["key"], row["digest"], float(str(weight)) if known else None))
    return tuple(found)
