"""Room for candidates that wait, in a merge that is full."""

from __future__ import annotations

from typing import Any

from continual.selection.active import Active
from continual.selection.frank_wolfe import room


def test_room_is_made_only_where_somebody_waits() -> None:
    now = Active({"a": (0.5, 0.1), "b": (0.1, 0.1), "c": (1.0, 0.0), "d": (0.2, 0.9)}, (0.5, 0.0), {}, {})
    waiting: Any = [object()] * 9
    assert room(now, [], 4) == now
    assert room(now, waiting, 8) == now
    made = room(now, waiting, 4)
    assert (list(made.weights), made.rest) == (["a", "c", "d"], (0.6, 0.1))
    assert list(room(now, waiting, 1).weights) == ["d"]
    assert list(room(now, waiting[:1], 16).weights) == list(now.weights)
