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
