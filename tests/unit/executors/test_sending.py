"""Orders that do not come back from a machine, on a real cluster of two: others do them, and it is left alone. What
comes when a machine goes meanwhile is asked of a link without a cluster."""

from __future__ import annotations

import contextlib
import logging
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from continual import retrying
from continual.errors import Abandoned, Refuse, Retry
from continual.executors import sending
from continual.executors.away import WorkAnswer
from continual.executors.cluster_figures import FIGURES, RayFigures
from continual.executors.driving import Began, Came, SendOrder
from continual.executors.links import Answers
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from tests.helpers import on_cluster
from tests.helpers.marking import Mark, MarkJob, tasks
from tests.helpers.services import until

MACHINES = ["127.0.0.2", "127.0.0.3"]


@pytest.fixture
def _forgiven() -> Iterator[None]:
    yield
    FIGURES.avoided.forgive(on_cluster.address(), MACHINES)


@pytest.fixture
def job(tmp_path: Path, _forgiven: None) -> MarkJob:
    return MarkJob(secrets.token_hex(8), tmp_path)


def on_ray(tries: int = 3, seconds: float | None = None) -> OnRay:
    asked = RayAsked(on_cluster.address(), tries=tries, workers=4, seconds=seconds)
    return OnRay(asked, Local(1, 1 << 40), threading.Event())


def done(executor: OnRay, job: MarkJob, kind: str, count: int = 8) -> dict[str, Mark]:
    return dict(executor.map(tasks(job, [f"{kind}-{number}" for number in range(count)])))


def bad(job: MarkJob) -> str:
    return (job.directory / "bad").read_text()


def tried(job: MarkJob, *machines: str) -> int:
    return sum(len(list(job.directory.glob(f"tried-*-{machine}"))) for machine in machines)


def avoided() -> dict[str, str]:
    return {name: one.why for name, one in FIGURES.seen(on_cluster.address()).avoided.items()}


def test_what_one_machine_cannot_do_another_does_and_the_first_is_left_alone(
    job: MarkJob, caplog: pytest.LogCaptureFixture
) -> None:
    executor, before = on_ray(), FIGURES.seen().failed
    caplog.set_level(logging.INFO, "continual.executors")
    assert len(done(executor, job, "full")) == 8
    machine, first = bad(job), tried(job, bad(job))
    assert tried(job, *MACHINES) == 8 + first
    assert 1 <= first <= 4, "a machine that fails at once would take all that is left"
    assert avoided().keys() == {machine}
    assert f"OSError: [Errno 28] No space left on device (on the machine {machine}): '/scratch/f" in avoided()[machine]
    assert FIGURES.seen().failed - before == first
    assert f"the machine {machine} gets no orders for 300 s, and its order that begins with full-" in caplog.text
    assert f"; {first} order{'s' * (first > 1)} sent to another machine" in caplog.text
    again = MarkJob("again", job.directory)
    assert len(done(executor, again, "full", 20)) == 20
    assert tried(job, machine) == first


def test_what_no_machine_can_do_is_said_and_held_against_none(job: MarkJob) -> None:
    (job.directory / "bad").write_text(" ".join(MACHINES))
    with pytest.raises(OSError, match=r"No space left on device \(on the machine 127.0.0"):
        done(on_ray(), job, "full")
    assert [tried(job, machine) > 0 for machine in MACHINES] == [True, True]
    assert avoided() == {}


def test_a_refusal_is_that_of_every_machine(job: MarkJob) -> None:
    with pytest.raises(Refuse, match="broken-0 cannot be done"):
        done(on_ray(), job, "broken", 1)
    assert avoided() == {}


def test_nothing_is_sent_again_where_the_settings_say_so(job: MarkJob) -> None:
    (job.directory / "bad").write_text(" ".join(MACHINES))
    with pytest.raises(OSError, match="No space left"):
        done(on_ray(tries=0), job, "full", 1)
    assert len(list(job.directory.glob("tried-*"))) == 1


def test_a_machine_that_lacks_what_one_work_needs_gets_the_orders_of_others(
    job: MarkJob, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(done(on_ray(), job, "apart", 12)) == 12
    assert 1 <= tried(job, bad(job)) <= 4
    assert f"the machine {bad(job)} gets no orders of this work: " in caplog.text
    assert avoided() == {}


def test_an_order_whose_worker_dies_on_one_machine_each_time_is_done_by_another(job: MarkJob) -> None:
    assert len(done(on_ray(tries=1), job, "dies", 12)) == 12
    assert 1 <= tried(job, bad(job)) < 12
    assert list(avoided()) in ([], [bad(job)])  # three in a row make it so, and it may not come to that
    assert all("3 orders in a row were lost there with their workers" in why for why in avoided().values())


def test_a_worker_that_stands_still_is_ended_and_its_order_done_elsewhere(
    job: MarkJob, caplog: pytest.LogCaptureFixture
) -> None:
    (job.directory / "wanted").write_text("4")
    done(on_ray(), job, "together", 4)  # all workers are there, and have loaded torch
    assert len(done(on_ray(seconds=3.0), job, "stops", 4)) == 4
    assert avoided()[bad(job)].startswith("it worked on one for more than 3 s, and ray.order_timeout")
    assert "that order, which begins with stops-" in caplog.text


def test_what_stands_still_everywhere_is_given_up_in_words(job: MarkJob) -> None:
    (job.directory / "bad").write_text(" ".join(MACHINES))
    with pytest.raises(Retry, match=r"stops-0 lost its worker 2 times \(it worked on one for more than 1 s"):
        done(on_ray(tries=1, seconds=1.0), job, "stops", 1)
    assert avoided() == {}


def test_which_machine_works_on_what_is_known_at_once(job: MarkJob) -> None:
    def work() -> None:
        with contextlib.suppress(Abandoned):
            list(executor.map(tasks(job, ["after-go"])))

    stopping = threading.Event()
    executor = OnRay(RayAsked(on_cluster.address()), Local(1, 1 << 40), stopping)
    worker = threading.Thread(target=work)
    worker.start()
    try:
        until(lambda: any(order.machine for order in FIGURES.seen(on_cluster.address()).out), "no machine works on it")
        (order,) = FIGURES.seen(on_cluster.address()).out
        assert order.machine in MACHINES
        assert order.began is not None
        assert order.began >= order.since
    finally:
        stopping.set()
        worker.join()


OPTIONS = {"num_cpus": 1, "num_gpus": 0, "memory": 1, "name": "x"}


class Link:
    """Two machines, of which the first cannot do an order, and the second goes when it is asked. `asked`: which ids
    each order that was sent might not be done on; `told`: what Ray was told of it."""

    address = "head"

    def __init__(self) -> None:
        self.nodes = [node("10.0.0.1", "a"), node("10.0.0.2", "b")]
        self.asked: list[tuple[str, ...]] = []
        self.told: list[Mapping[str, Any]] = []
        self.dropped: list[int] = []

    def order(self, order: SendOrder, to: Answers) -> int:
        number = len(self.asked)
        self.asked.append(order.avoid)
        self.told.append(order.options)
        self.answer(number, order, to)
        return number

    def answer(self, number: int, order: SendOrder, to: Answers) -> None:
        if number == 1:
            del self.nodes[1]
        else:
            self.does(number, order, to, "a", OSError("its disk is full") if number == 0 else None)

    def does(self, number: int, order: SendOrder, to: Answers, node: str, error: Exception | None = None) -> None:
        """Has a machine begin with it, and give it back."""
        machine = {"a": "10.0.0.1", "b": "10.0.0.2"}[node]
        to.put(Began(number, machine, node))
        to.put(Came(number, pickle.dumps(WorkAnswer([Mark(n, 1) for n in order.names], error, machine, 0.1))))

    def drop(self, number: int) -> None:
        self.dropped.append(number)

    def end(self, numbers: list[int], _answers: Answers) -> None:
        assert numbers == []

    def job(self, _job: str, _pickled: bytes | None) -> None:
        pass


def node(address: str, identity: str) -> dict[str, Any]:
    return {"NodeID": identity, "NodeManagerAddress": address, "Resources": {"CPU": 1.0, "memory": 1e9}}


@pytest.fixture
def _pardoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sending, "LOOK", 0.01)
    yield
    FIGURES.avoided.forgive("head", ["10.0.0.1", "10.0.0.2"])


def sent(
    link: Link, directory: Path, names: Sequence[str] = ("x",), options: Callable[[], dict[str, Any]] = OPTIONS.copy
) -> list[tuple[str, Mark]]:
    """What comes of orders of these names through a link, all of them out at a time."""
    looks, figures = iter(range(500)), RayFigures()
    with figures.driving(len(names)) as driven:
        limits = sending.SendLimits(len(names), 3, None)
        orders = sending.Sending[Mark](
            link,  # type: ignore[arg-type]
            limits,
            lambda _group: options(),
            driven,
            lambda: next(looks),
        )
        return list(orders.run([tasks(MarkJob("linked", directory), [name]) for name in names]))


@pytest.mark.usefixtures("_pardoned")
def test_an_order_goes_back_to_a_machine_where_all_others_have_gone(tmp_path: Path) -> None:
    link = Link()
    assert sent(link, tmp_path) == [("x", Mark("x", 1))]
    assert link.asked == [(), ("a",), ()]
    assert link.dropped == [1]


class Answering(Link):
    """Two machines, of which the first cannot do an order, and the second can."""

    def answer(self, number: int, order: SendOrder, to: Answers) -> None:
        self.does(number, order, to, "b" if number else "a", None if number else OSError("its disk is full"))


@pytest.mark.usefixtures("_pardoned")
def test_where_all_machines_are_avoided_an_order_does_not_go_back_to_the_one_it_failed_on(tmp_path: Path) -> None:
    link = Answering()
    FIGURES.avoided.avoid("head", "10.0.0.2", ["b"], "another work's")
    assert sent(link, tmp_path) == [("x", Mark("x", 1))]
    assert link.asked == [("b",), ("a",)]


class Shrinking(Link):
    """Two machines, of which the one that has what an order reserves goes before it begins."""

    def answer(self, number: int, order: SendOrder, to: Answers) -> None:
        if number == 0:
            del self.nodes[0]
        else:
            self.does(number, order, to, "b")


@pytest.mark.usefixtures("_pardoned")
def test_an_order_that_reserves_more_than_a_machine_has_that_is_left_is_sent_anew(tmp_path: Path) -> None:
    link = Shrinking()
    link.nodes[0]["Resources"] = {"CPU": 1.0, "memory": 9e9}

    def options() -> dict[str, Any]:
        return {**OPTIONS, "memory": max(node["Resources"]["memory"] for node in link.nodes)}

    assert sent(link, tmp_path, options=options) == [("x", Mark("x", 1))]
    assert [told["memory"] for told in link.told] == [9e9, 1e9]
    assert (link.asked, link.dropped) == ([(), ()], [0])


class Unreadable(Answering):
    """The answer of the first machine is of a class that is not here."""

    def answer(self, number: int, order: SendOrder, to: Answers) -> None:
        if number:
            self.does(number, order, to, "b")
            return
        to.put(Began(number, "10.0.0.1", "a"))
        to.put(Came(number, b"cnot.here\nError\n."))


@pytest.mark.usefixtures("_pardoned")
def test_an_answer_that_cannot_be_read_is_held_against_the_machine(tmp_path: Path) -> None:
    link = Unreadable()
    assert sent(link, tmp_path) == [("x", Mark("x", 1))]
    assert link.asked == [(), ("a",)]
    (found,) = FIGURES.avoided.now("head").values()
    assert "its answer cannot be read here: ModuleNotFoundError: No module named 'not'" in found.why
    assert "10.0.0.1" in found.why


class Standing(Link):
    """Two machines, of which no worker of the first ever starts: the first order that it is given waits for one. A
    third one joins meanwhile."""

    def answer(self, number: int, order: SendOrder, to: Answers) -> None:
        if number:
            self.nodes = [*self.nodes[:2], node("10.0.0.3", "c")]
            self.does(number, order, to, "b")


@pytest.mark.usefixtures("_pardoned")
def test_a_machine_whose_workers_do_not_start_is_avoided_and_its_order_done_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "FIRST_START", 0.1)
    link = Standing()
    assert [name for name, _ in sent(link, tmp_path, ["x", "y"])] == ["y", "x"]
    assert link.asked == [(), (), ("a",)]
    assert link.dropped == [0]
    (found,) = FIGURES.avoided.now("head").values()
    assert (found.why, found.ids) == (
        "none of its workers began with an order for 0 s, and those of others did",
        {"a"},
    )


class Alone(Link):
    """Orders that no machine begins with, for a while."""

    def answer(self, number: int, order: SendOrder, to: Answers) -> None:
        if number == 2:
            self.does(number, order, to, "b")


@pytest.mark.usefixtures("_pardoned")
def test_where_no_machine_begins_none_is_blamed_and_an_order_is_sent_anew_more_and_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "FIRST_START", 0.1)
    link, began = Alone(), time.monotonic()
    assert sent(link, tmp_path) == [("x", Mark("x", 1))]
    assert time.monotonic() - began >= 0.3
    assert (link.asked, link.dropped) == ([(), (), ()], [0, 1])
    assert FIGURES.avoided.now("head") == {}
