"""Arrays that may end early, against plain arrays: whatever is written from whichever row on, what is read is that."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.blocks import slots
from continual.records import TensorSpec
from continual.state import Format, State
from continual.state.format import AdaptersForm
from continual.state.verify import verify
from tests.helpers import stores

ROWS, WIDTH = 40, 7
STEPS = st.lists(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS), st.booleans()), min_size=1, max_size=6)


def make(path: Path) -> State:
    """A state with one layer that can be adapted, and another that never is."""
    specs = [TensorSpec("a.weight", (WIDTH, 3), "F32", "matrix"), TensorSpec("b.weight", (2, 2), "F32", "matrix")]
    kept = {spec.name: slots(*spec.shape, ROWS) for spec in specs}
    form = Format.new(stores.BASE, specs, "iso-c", {}, kept, AdaptersForm(ROWS))
    return State.create(path, form, read={"policy": "number", "value": 1.0}, device="cpu")


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_rows_are_what_was_written(steps: list[tuple[int, int, bool]]) -> None:
    work = Path(tempfile.mkdtemp())
    expected = np.zeros((ROWS, WIDTH), np.float32)
    used = 0
    try:
        with make(work / "s") as state:
            for number, (start, stop, keep) in enumerate(steps, 1):
                with state.begin(writes=0) as transaction:
                    if keep:
                        transaction.keep("a.weight")
                    else:
                        start, stop = min(start, used), max(min(start, used), stop)
                        values = np.full((stop - start, WIDTH), number, np.float32)
                        expected[start:] = 0
                        expected[start:stop], used = values, stop
                        transaction.write_rows("a.weight", "u", start, values)
                        transaction.write_rows("a.weight", "v", 0, np.zeros((0, 3), np.float32))
                        transaction.write("a.weight", "columns", np.full((ROWS, 4), number, np.float64))
                    transaction.keep("b.weight")
                    state.commit(transaction, stores.entry(number))
                assert np.array_equal(state.read("a.weight", "u"), expected)
                generation = state.generation_of(state.ledger.head)
                assert generation is not None
                assert np.array_equal(generation.read_rows("a.weight", "u", 3, 21), expected[3:21])
                assert not state.read("b.weight", "u").any()
                if generation.has("a.weight"):
                    group = state.group()["u/a.weight"]
                    assert isinstance(group, zarr.Array)
                    assert np.array_equal(np.asarray(group[:]), expected)
            assert verify(state) == []
    finally:
        shutil.rmtree(work)
