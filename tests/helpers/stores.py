"""A small state with a history, written through `State` alone, for the tests of the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from continual.records import Candidate, SlotSpec, TensorSpec, Totals
from continual.state import Format, State
from continual.state.entries import FoldEntry, RefuseEntry
from continual.state.format import BaseRecord
from continual.state.parts import FoldNumbers

BASE = BaseRecord(path="/base", files=(), digests={}, squares={}, plain=(), exclude=())
SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (3, 4),
    "scalar": (),
    "empty": (0, 5),
    ".hidden/name": (7,),
    "__x": (2,),
    "zarr.json": (1,),
    "wide": (2, 300),
}


def make(path: Path) -> State:
    """A new state open for writing, with a slot `sum` per tensor and one carried tensor."""
    specs = [TensorSpec(name, shape, "F32", "plain") for name, shape in SHAPES.items()] + [
        TensorSpec("ids", (4,), "I64", "carried")
    ]
    slots = {s.name: {} if s.kind == "carried" else {"sum": SlotSpec(s.shape)} for s in specs}
    read = {"policy": "number", "value": 1.0}
    return State.create(path, Format.new(BASE, specs, "mean", {}, slots), read=read, device="cpu")


def value(name: str, number: int) -> np.ndarray:
    """What tensor `name` holds after fold `number`."""
    shape = SHAPES[name]
    return (np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) + np.float32(100 * number)).astype(
        np.float32
    )


def entry(number: int) -> FoldEntry:
    """What the record of fold `number` says."""
    return FoldEntry(
        candidate=Candidate(f"k{number}", f"n{number}", "test", f"/o{number}", "full", 1),
        digest=f"blake3:{number}",
        totals=Totals(count=float(number)),
        numbers=FoldNumbers(tau_norm=1.0),
    )


def fold(state: State, number: int) -> int:
    """Fold `number` (from 1) of a made-up candidate; returns its record."""
    with state.begin() as transaction:
        for name in SHAPES:
            transaction.write(name, "sum", value(name, number))
        return state.commit(transaction, entry(number)).seq


def history(path: Path) -> None:
    """Three folds, a refusal, a tag and a rollback to the second fold."""
    with make(path) as state:
        fold(state, 1)
        fold(state, 2)
        refused = Candidate("bad", "bad", "test", "/bad", "full", 1)
        state.record(RefuseEntry(candidate=refused, reason="shape", message="bad: does not fit"))
        state.tag("first", 1)
        fold(state, 3)
        state.rollback(2)
