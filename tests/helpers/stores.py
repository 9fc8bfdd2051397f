"""A small state with a history, written through `State` alone, for the tests of the format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from continual.blocks import slots
from continual.records import Candidate, SlotSpec, TensorSpec, Totals
from continual.state import Format, State, framing
from continual.state.entries import FoldEntry, RefuseEntry
from continual.state.format import AdaptersForm, BaseRecord, HeaderRecord
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


@contextmanager
def made_otherwise(path: Path) -> Iterator[dict[str, Any]]:
    """What format.json of a state without folds says, to be changed: as if it had been made so, by another version."""
    body, _ = framing.decode(path / "format.json")
    yield body
    data, crc = framing.encode(body)
    (path / "format.json").write_bytes(data)
    record = path / "commits" / "00000000.json"
    first, _ = framing.decode(record)
    assert isinstance(first["numbers"], dict)
    first["numbers"]["format"] = crc
    data, crc = framing.encode(first)
    record.write_bytes(data)
    head, _ = framing.decode(path / "HEAD")
    (path / "HEAD").write_bytes(framing.encode(head | {"crc": crc})[0])


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


LAYERS: dict[str, tuple[int, ...]] = {"a.weight": (5, 3), "never.weight": (2, 2), "bias": (4,)}
WIDTH = 24


def make_of_adapters(path: Path, version: int = 3) -> State:
    """A new state that keeps adapters, open for writing; of the version 2 or 3 of the format."""
    specs = [TensorSpec(name, shape, "F32", "matrix" if len(shape) == 2 else "plain") for name, shape in LAYERS.items()]
    kept = {name: slots(shape[0], int(np.prod(shape[1:])), WIDTH) for name, shape in LAYERS.items()}
    base = replace(
        BASE, headers={name: HeaderRecord("F32", shape) for name, shape in LAYERS.items()}, aliases={}, config="{}"
    )
    form = Format.new(base, specs, "iso-c", {"include": []}, kept, AdaptersForm(WIDTH))
    form = replace(form, version=version)
    return State.create(path, form, read={"policy": "spread", "value": 1.15}, device="cpu")


def columns(upto: int) -> np.ndarray:
    """The small array of `a.weight` after the adapters 1 … `upto`, of rank 10 each."""
    found = np.zeros((WIDTH, 4))
    for row in range(10 * upto):
        found[row] = (row // 10 + 1, 10, 10 - row % 10, 385)
    return found


def rows(upto: int, size: int) -> np.ndarray:
    """The singular vectors of the same: row i is i."""
    return np.repeat(np.arange(10 * upto, dtype=np.float32)[:, None], size, 1)


def history_of_adapters(path: Path, version: int = 3) -> None:
    """Two adapters of the layer `a.weight`, the second also of `bias`."""
    with make_of_adapters(path, version) as state:
        for number in (1, 2):
            with state.begin(writes=0) as transaction:
                for slot, size in (("u", 5), ("v", 3)):
                    transaction.write_rows("a.weight", slot, 10 * (number - 1), rows(number, size)[10 * (number - 1) :])
                transaction.write("a.weight", "columns", columns(number))
                if number == 2:
                    transaction.write_rows("bias", "u", 0, rows(1, 4)[:1])
                    transaction.write_rows("bias", "v", 0, rows(1, 1)[:1])
                    transaction.write("bias", "columns", columns(1))
                else:
                    transaction.keep("bias")
                transaction.keep("never.weight")
                made = entry(number)
                state.commit(transaction, replace(made, numbers=replace(made.numbers, block=number, cut=0.0)))
