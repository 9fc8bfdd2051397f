from pathlib import Path

from continual.queue import Queue, retry_delay
from continual.records import Event

ROOT = Path("/watched")


def event(name: str, when: int) -> Event:
    return Event("folder", ROOT / name, (when, name))


def test_order_is_time_then_name_whatever_the_arrival() -> None:
    queue = Queue()
    for name, when in (("c", 2), ("b", 2), ("a", 3), ("d", 1)):
        queue.put(event(name, when), ROOT)
    taken = [queue.take(0.0) for _ in range(4)]
    assert [w.event.path.name for w in taken if w] == ["d", "b", "c", "a"]
    assert queue.take(0.0) is None


def test_one_that_failed_waits_and_does_not_hold_up_the_rest() -> None:
    queue = Queue()
    queue.put(event("a", 1), ROOT)
    queue.put(event("b", 2), ROOT)
    first = queue.take(0.0)
    assert first is not None
    assert queue.again(first, 100.0) == 5.0
    second = queue.take(100.0)
    assert second is not None
    assert second.event.path.name == "b"
    assert queue.take(104.9) is None
    assert queue.next_due() == 105.0
    again = queue.take(105.0)
    assert again is not None
    assert again.attempt == 1


def test_newer_event_wins_over_one_that_failed() -> None:
    queue = Queue()
    queue.put(event("a", 1), ROOT)
    failed = queue.take(0.0)
    assert failed is not None
    queue.put(event("a", 2), ROOT)
    queue.again(failed, 0.0)
    taken = queue.take(0.0)
    assert taken is not None
    assert taken.event.order == (2, "a")
    assert queue.next_due() is None


def test_delays_double_up_to_five_minutes() -> None:
    assert [retry_delay(n) for n in (1, 2, 3, 7, 1000)] == [5.0, 10.0, 20.0, 300.0, 300.0]
