"""The queue: in which order candidates are taken, and when one that failed comes again."""

from pathlib import Path

from continual.config import Settings
from continual.hub.locate import Places
from continual.records import Event
from continual.retrying import retry_delay
from continual.service.queue import Queue
from continual.sources.contract import Wiring
from continual.sources.folder import FolderSource
from continual.sources.hub import HubSource

ROOT = Path("/watched")
FOLDER = FolderSource(ROOT)


def event(name: str, when: int) -> Event:
    return Event("folder", str(ROOT / name), (when, name), ROOT)


def test_order_is_time_then_name_whatever_the_arrival() -> None:
    queue = Queue()
    for name, when in (("c", 2), ("b", 2), ("a", 3), ("d", 1)):
        queue.put(event(name, when), FOLDER)
    taken = [queue.take(0.0) for _ in range(4)]
    assert [w.event.name for w in taken if w] == ["d", "b", "c", "a"]
    assert queue.take(0.0) is None


def test_one_that_failed_waits_and_does_not_hold_up_the_rest() -> None:
    queue = Queue()
    queue.put(event("a", 1), FOLDER)
    queue.put(event("b", 2), FOLDER)
    first = queue.take(0.0)
    assert first is not None
    assert queue.again(first, 100.0) == 5.0
    second = queue.take(100.0)
    assert second is not None
    assert second.event.name == "b"
    assert queue.take(104.9) is None
    assert queue.next_due() == 105.0
    again = queue.take(105.0)
    assert again is not None
    assert again.attempt == 1


def test_the_same_event_again_keeps_its_count_and_its_turn() -> None:
    queue = Queue()
    queue.put(event("a", 1), FOLDER)
    failed = queue.take(0.0)
    assert failed is not None
    queue.again(failed, 0.0)
    queue.put(event("a", 1), FOLDER)
    assert queue.take(4.9) is None, "a source that gives it all the time does not have it looked at all the time"
    assert queue.waiting[event("a", 1).key].attempt == 1


def test_new_ones_go_before_those_that_failed() -> None:
    queue = Queue()
    for number in range(3):
        queue.put(event(f"bad{number}", number), FOLDER)
    for _ in range(3):
        failed = queue.take(0.0)
        assert failed is not None
        queue.again(failed, 0.0)
    queue.put(event("new", 9), FOLDER)
    taken = [queue.take(100.0) for _ in range(4)]
    assert [w.event.name for w in taken if w] == ["new", "bad0", "bad1", "bad2"]


def test_ten_thousand_are_taken_as_cheaply_as_ten() -> None:
    def steps(count: int) -> int:
        """Comparisons of two candidates that `count` puts and takes need."""
        asked = 0

        class Counted(int):
            def __lt__(self, other: int) -> bool:
                nonlocal asked
                asked += 1
                return int(self) < int(other)

        queue = Queue()
        for number in range(count):
            when = Counted(number * 7919 % count)
            queue.put(Event("folder", f"/in/{number}", (when, str(number)), ROOT), FOLDER)
        for _ in range(count):
            assert queue.take(0.0) is not None
            queue.next_due()
        return asked

    assert steps(10_000) / 10_000 < 4 * steps(100) / 100, "it grows as the logarithm"


def test_newer_event_wins_over_one_that_failed() -> None:
    queue = Queue()
    queue.put(event("a", 1), FOLDER)
    failed = queue.take(0.0)
    assert failed is not None
    queue.put(event("a", 2), FOLDER)
    queue.again(failed, 0.0)
    taken = queue.take(0.0)
    assert taken is not None
    assert taken.event.order == (2, "a")
    assert queue.next_due() is None


def test_delays_double_up_to_five_minutes() -> None:
    assert [retry_delay(n) for n in (1, 2, 3, 7, 1000)] == [5.0, 10.0, 20.0, 300.0, 300.0]


def test_a_repo_of_the_hub_is_parked_in_the_end_and_a_commit_does_not_replace_another(tmp_path: Path) -> None:
    settings = Settings()
    hub = HubSource(Wiring(settings, Places(settings), tmp_path, lambda _key: False, ()))
    queue = Queue()
    for sha in ("1" * 40, "2" * 40):
        queue.put(Event("hub", "hf://org/m", (1, sha), revision=sha), hub)
    assert len(queue.waiting) == 2
    failed = queue.take(0.0)
    assert failed is not None
    failed.attempt = 19
    assert (queue.again(failed, 0.0), failed.parked) == (300.0, False)
    failed = queue.take(300.0)
    while failed is not None and failed.event.revision != "1" * 40:
        failed = queue.take(300.0)
    assert failed is not None
    assert (queue.again(failed, 300.0), failed.parked) == (3600.0, True)
    assert queue.again(queue.waiting.popitem()[1], 0.0, after=5000.0) == 5000.0


def test_a_folder_is_never_parked() -> None:
    queue = Queue()
    queue.put(event("a", 1), FOLDER)
    failed = queue.take(0.0)
    assert failed is not None
    failed.attempt = 999
    assert (queue.again(failed, 0.0), failed.parked) == (300.0, False)
