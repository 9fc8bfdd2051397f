"""Arrays that may end early, against plain arrays: whatever is written from whichever row on, what is read is that."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.state.verify import verify
from tests.helpers import stores

NAME, ROWS, SIZE = "a.weight", stores.WIDTH, 5
STEPS = st.lists(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_rows_are_what_was_written(steps: list[tuple[int, int, bool]]) -> None:
    work = Path(tempfile.mkdtemp())
    expected = np.zeros((ROWS, SIZE), np.float32)
    used = 0
    try:
        with stores.make_of_adapters(work / "s") as state:
            for number, (start, stop, keep) in enumerate(steps, 1):
                with state.begin(writes=0) as transaction:
                    if keep:
                        transaction.keep(NAME)
                    else:
                        start, stop = min(start, used), max(min(start, used), stop)
                        values = np.full((stop - start, SIZE), number, np.float32)
                        expected[start:] = 0
                        expected[start:stop], used = values, stop
                        transaction.write_rows(NAME, "u", start, values)
                        transaction.write_rows(NAME, "v", 0, np.zeros((0, 3), np.float32))
                        transaction.write(NAME, "columns", np.full((ROWS, 4), number, np.float64))
                    transaction.keep("never.weight")
                    transaction.keep("bias")
                    state.commit(transaction, stores.entry(number))
                assert np.array_equal(state.read(NAME, "u"), expected)
                generation = state.generation_of(state.ledger.head)
                assert generation is not None
                assert np.array_equal(generation.read_rows(NAME, "u", 3, 21), expected[3:21])
                assert not state.read("never.weight", "u").any()
                shared = state.group()[f"u/{SIZE}"]
                assert isinstance(shared, zarr.Array)
                assert shared.attrs["tensors"] == [NAME]
                assert np.array_equal(np.asarray(shared[0]), expected)
            assert verify(state) == []
    finally:
        shutil.rmtree(work)
