"""What is counted of a cluster, whatever machines come and go; and what a log line says of it."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest

from continual.executors.cluster_figures import LABELS, WORKED, NodeSeen, RayFigures, WorkDone, nodes_of, told


def node(address: str, *, alive: bool = True, **resources: float) -> dict[str, object]:
    """A row of `ray.nodes()`, as Ray 2.58 gave it: dead nodes have resources, too."""
    return {"NodeID": "ab", "Alive": alive, "NodeManagerAddress": address, "Resources": resources}


def test_orders_are_out_until_they_come_or_are_lost() -> None:
    times = itertools.count(100.0)
    figures = RayFigures(lambda: next(times))
    assert (figures.seen().since, figures.is_driving) == (None, False)
    with figures.driving(3) as driven:
        driven.sent("b", 2)
        driven.sent("a", 1)
        assert [(one.first, one.pieces, one.since, one.lost) for one in figures.seen().out] == [
            ("b", 2, 101.0, 0),
            ("a", 1, 102.0, 0),
        ]
        driven.came("b", "10.0.0.1", 50, 0.5)
        assert driven.was_lost("a") == 1
        seen = figures.seen()
        assert (seen.done, seen.total, seen.out, seen.lost, seen.since) == (1, 3, (), 1, 100.0)
        driven.sent("a", 1)
        assert figures.seen().out[0].lost == 1
        assert driven.was_lost("a") == 2
        driven.sent("a", 1)
        assert figures.is_driving
    seen = figures.seen()
    assert (seen.done, seen.total, seen.out, seen.since, figures.is_driving) == (0, 0, (), None, False)
    assert (seen.lost, seen.all, seen.work["10.0.0.1"].last) == (2, WorkDone(1, 50, 0.5), "b")


def fails(figures: RayFigures) -> None:
    with figures.driving(2) as driven:
        driven.sent("y", 1)
        assert (figures.seen().total, len(figures.seen().out)) == (7, 2)
        raise RuntimeError


def test_work_that_fails_is_under_way_no_more_and_what_runs_beside_it_is() -> None:
    figures = RayFigures()
    with figures.driving(5) as beside:
        beside.sent("x", 1)
        with pytest.raises(RuntimeError):
            fails(figures)
        assert (figures.seen().total, [one.first for one in figures.seen().out]) == (5, ["x"])


def test_labels_stay_bounded_and_no_count_goes_back_where_machines_come_and_go() -> None:
    figures = RayFigures()
    before: dict[str, WorkDone] = {}
    with figures.driving(5 * WORKED) as driven:
        for number in range(5 * WORKED):
            driven.sent("t", 1)
            driven.came("t", f"10.0.{number % (2 * WORKED)}.1", 10, 1.0)
            seen = figures.seen()
            assert all(seen.labelled[label].orders >= done.orders for label, done in before.items())
            before = dict(seen.labelled)
            told_of = sum(work.done.orders for work in seen.work.values()) + seen.gone.orders
            assert told_of == seen.all.orders == number + 1
    assert len(seen.labelled) == LABELS + 1
    assert len(seen.work) == WORKED
    assert seen.labelled["10.0.3.1"].orders == 3
    assert seen.labelled["other"].orders == 5 * WORKED - sum(
        done.orders for label, done in seen.labelled.items() if label != "other"
    )
    assert len(driven.machines) == 2 * WORKED


def test_of_machines_that_are_gone_only_those_are_kept_that_worked_and_they_make_room_first() -> None:
    times = itertools.count()
    figures = RayFigures(lambda: float(next(times)))
    names = [f"10.0.{number}.1" for number in range(WORKED)]
    with figures.driving(WORKED + 1) as driven:
        for name in names:
            driven.sent(name, 1)
            driven.came(name, name, 1, 1.0)
        gone = names[40]
        nodes = {name: NodeSeen(alive=name != gone) for name in names}
        figures.answered("head", nodes | {"never": NodeSeen(alive=False), "idle": NodeSeen(alive=True)})
        assert figures.seen("head").nodes.keys() == {*names, "idle"}
        driven.sent("new", 1)
        driven.came("new", "10.1.0.1", 1, 1.0)
    assert set(names) - figures.seen().work.keys() == {gone}
    assert figures.seen().gone.orders == 1


def test_each_cluster_has_its_machines_and_the_work_is_that_of_all() -> None:
    figures = RayFigures(lambda: 7.0)
    figures.answered("one", {"10.0.0.1": NodeSeen(alive=True)})
    figures.answered("two", {"10.1.0.1": NodeSeen(alive=True)})
    with figures.driving(1) as driven:
        driven.sent("a", 1)
        driven.came("a", "10.0.0.1", 1, 1.0)
    figures.parted("one")
    one, two, none = (figures.seen(address) for address in ("one", "two", "three"))
    assert (one.nodes.keys(), one.parted, one.answered) == ({"10.0.0.1"}, 7.0, 7.0)
    assert (two.nodes.keys(), two.parted) == ({"10.1.0.1"}, None)
    assert (none.nodes, none.answered, none.parted) == ({}, None, None)
    assert one.all.orders == two.all.orders == none.all.orders == 1
    figures.answered("one", {})
    assert figures.seen("one").parted is None


def test_nodes_of_one_machine_are_told_of_together_and_what_was_there_before_counts_for_nothing() -> None:
    found = nodes_of(
        [
            node("10.0.0.1", alive=False, CPU=64.0, memory=5e9),
            node("10.0.0.1", CPU=2.0, memory=2e9, GPU=1.0, object_store_memory=1e9),
            node("10.0.0.1", CPU=2.0, memory=1e9),
            node("10.0.0.2", alive=False, CPU=4.0),
            node("10.0.0.3"),
        ]
    )
    assert found == {
        "10.0.0.1": NodeSeen(True, 4.0, 3_000_000_000, 1.0, ("ab", "ab")),
        "10.0.0.2": NodeSeen(False),
        "10.0.0.3": NodeSeen(True, ids=("ab",)),
    }


def test_a_log_line_says_who_did_how_much() -> None:
    figures = RayFigures()
    with figures.driving(4) as driven:
        for first, machine, seconds in (("a", "10.0.0.2", 1.0), ("b", "10.0.0.1", 2.5), ("c", "10.0.0.2", 0.5)):
            driven.sent(first, 1)
            driven.came(first, machine, 3_000_000, seconds)
        assert told(driven) == (
            "3 orders done on the cluster: 10.0.0.1 did 1 order in 2.5 s and read 3 MB; "
            "10.0.0.2 did 2 orders in 1.5 s and read 6 MB"
        )
        driven.sent("d", 1)
        driven.was_lost("d")
        assert told(driven).endswith("; 1 order lost with a worker and sent out again")
        for number in range(200):
            driven.sent("e", 1)
            driven.came("e", f"10.1.{number}.1", 1, 0.1)
        assert "; 190 more machines did the rest; 1 order lost" in told(driven)
        assert len(told(driven)) < 1000


def test_who_reads_never_sees_half_of_it() -> None:
    figures = RayFigures()
    over = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not over.is_set():
            seen = figures.seen()
            orders = sum(work.done.orders for work in seen.work.values())
            if not orders == seen.all.orders == seen.done or len(seen.out) > 1:
                wrong.append(seen)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        with figures.driving(2000) as driven:
            for number in range(2000):
                driven.sent("t", 1)
                driven.came("t", f"10.0.0.{number % 7}", 1, 0.1)
            over.set()
            reader.join()
    finally:
        over.set()
        sys.setswitchinterval(interval)
    assert wrong == []
