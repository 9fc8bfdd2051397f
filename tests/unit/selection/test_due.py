"""When a round is due: pure decisions on made-up pools."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.selection import clock, fates, is_due, next_due
from continual.selection.round_options import DAY
from continual.state.ledger import Waiting
from tests.helpers.waiting import NOW, OPTIONS, ago, options, pool, waiting


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pool(), False),
        (pool(waiting(99.0), waiting(1.0)), False),
        (pool(waiting(100.0), waiting(1.0)), True),
        (pool(*[waiting(1.0)] * 3), False),
        (pool(*[waiting(1.0)] * 4), True),
        (pool(*[waiting(200.0, 1)] * 9), False),  # judged before: nothing new to find
        (pool(*[waiting(1.0)] * 3, waiting(200.0, 1)), False),
        (pool(waiting(200.0, seen=True)), False),
        (pool(waiting(10 * DAY, 1)), True),
        (pool(waiting(1.0, 1, fate="chosen")), True),  # a round chose it, and it is not folded yet
    ],
)
def test_when_a_round_is_due(found: dict[str, Waiting], expected: bool) -> None:
    assert is_due(found, OPTIONS, NOW) is expected


def test_when_the_next_is_due_if_nothing_comes() -> None:
    assert next_due(pool(), OPTIONS, NOW) is None
    assert next_due(pool(waiting(30.0), waiting(10.0)), OPTIONS, NOW) == 70.0
    assert next_due(pool(waiting(130.0)), OPTIONS, NOW) == 0.0
    assert next_due(pool(waiting(DAY, 1)), OPTIONS, NOW) == 9 * DAY


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=4), st.integers(40, 200), st.integers(40, 200))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_waiting_till_the_next_finds_it_due_and_not_before(found: list[tuple[int, bool]], wait: int, age: int) -> None:
    chosen = options(wait=float(wait), age=float(age), size=9)
    candidates = pool(*(waiting(float(seconds), seen=seen) for seconds, seen in found))
    left = next_due(candidates, chosen, NOW)
    if left is None:
        assert not candidates
        return
    assert is_due(candidates, chosen, ago(-left))
    if not is_due(candidates, chosen, NOW):
        assert left > 0
        assert not is_due(candidates, chosen, ago(-(left - 0.5)))


def test_the_clock_is_as_the_records_have_it() -> None:
    assert abs(fates.seconds(clock(), datetime.now(UTC).isoformat())) < 5
    assert clock().endswith("Z")
    assert len(clock()) == len(NOW)
