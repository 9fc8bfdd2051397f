"""Machines that are avoided for a while, by a clock."""

from __future__ import annotations

from continual.executors.avoiding import AvoidedNodes
from continual.executors.cluster_figures import NodeSeen, RayFigures


def test_a_machine_is_avoided_for_longer_each_time_in_a_row_until_it_works() -> None:
    now = [1000.0]
    avoided = AvoidedNodes(lambda: now[0])
    lengths = []
    for _ in range(6):
        lengths.append(avoided.avoid("head", "10.0.0.1", ["a"], "its disk is full"))
        assert avoided.avoid("head", "10.0.0.1", ["a"], "said by another order") == 0
        assert [(name, one.why) for name, one in avoided.now("head").items()] == [("10.0.0.1", "its disk is full")]
        avoided.works("head", "10.0.0.1")  # an order that was there already: it changes nothing
        now[0] += lengths[-1]
        assert avoided.now("head") == {}
    assert lengths == [300, 600, 1200, 2400, 3600, 3600]
    avoided.works("head", "10.0.0.1")
    assert avoided.avoid("head", "10.0.0.1", ["a"], "full again") == 300


def test_a_clock_that_is_set_back_makes_it_no_longer() -> None:
    now = [1000.0]
    avoided = AvoidedNodes(lambda: now[0])
    avoided.avoid("head", "10.0.0.1", ["a"], "its disk is full")
    now[0] -= 86_400
    assert avoided.now("head") == {}
    assert avoided.avoid("head", "10.0.0.1", ["a"], "still full") == 600
    assert avoided.now("head").keys() == {"10.0.0.1"}


def test_each_cluster_has_its_own_and_who_is_forgiven_is_as_new() -> None:
    avoided = AvoidedNodes(lambda: 5.0)
    avoided.avoid("head", "10.0.0.1", ["a"], "x")
    assert avoided.now("other") == {}
    avoided.forgive("head", ["10.0.0.1", "10.0.0.2"])
    avoided.forgive("other", ["10.0.0.1"])
    assert avoided.now("head") == {}
    assert avoided.avoid("head", "10.0.0.1", ["a"], "x") == 300


def test_a_machine_that_was_started_anew_has_a_chance() -> None:
    figures = RayFigures(lambda: 5.0)
    for address, ids in (("10.0.0.1", ["a", "b"]), ("10.0.0.2", ["c"])):
        figures.avoided.avoid("head", address, ids, "x")
    there = {"10.0.0.1": NodeSeen(True, ids=("b",)), "10.0.0.2": NodeSeen(True, ids=("d",))}
    figures.answered("other", {})
    assert len(figures.seen("head").avoided) == 2
    figures.answered("head", there)
    assert figures.seen("head").avoided.keys() == {"10.0.0.1"}
