"""When a model has been still long enough: time is an argument, and so is what was seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from continual.records import FileStat
from continual.sources.directories import FolderSighting
from continual.sources.settling import Settling


def seen(path: str, version: int, whole: bool = True, changed: float = 0.0) -> FolderSighting:
    return FolderSighting(path, (FileStat("model.safetensors", 1, version, 1),), whole, (version, path), changed)


def ready(settling: Settling, now: float, *sightings: FolderSighting) -> list[str]:
    for sighting in sightings:
        settling.saw(sighting, now)
    return [sighting.path for sighting in settling.take(now)]


def test_ready_once_after_the_settle_time() -> None:
    settling = Settling(5.0)
    assert ready(settling, 0.0, seen("a", 1)) == []
    assert settling.next_look(1.0) == 4.0
    assert ready(settling, 4.9, seen("a", 1)) == []
    assert ready(settling, 5.0, seen("a", 2)) == [], "it changed: the time begins again"
    assert ready(settling, 10.0, seen("a", 2)) == ["a"]
    assert settling.take(99.0) == []
    assert settling.next_look(99.0) is None


def test_nothing_is_taken_that_was_not_looked_at_again() -> None:
    settling = Settling(5.0)
    settling.saw(seen("a", 1), 0.0)
    assert settling.take(5.0) == []
    assert settling.due(5.0) == ["a"]
    assert ready(settling, 5.1, seen("a", 1)) == ["a"]
    assert settling.due(9.9) == []


def test_of_several_the_smallest_order_comes_first() -> None:
    settling = Settling(1.0)
    models = [seen("c", 3), seen("b", 1), seen("a", 1), seen("d", 2)]
    ready(settling, 0.0, *models)
    assert ready(settling, 1.0, *models) == ["a", "b", "d", "c"]


def test_gone_and_come_again_waits_again() -> None:
    settling = Settling(1.0)
    ready(settling, 0.0, seen("a", 1))
    settling.gone("a")
    assert ready(settling, 1.0, seen("a", 1)) == []
    assert ready(settling, 2.0, seen("a", 1)) == ["a"]


def test_one_that_never_becomes_whole_is_handed_on_at_last() -> None:
    settling = Settling(5.0)
    part = seen("a", 1, whole=False)
    assert ready(settling, 0.0, part) == []
    assert ready(settling, 299.0, part) == []
    assert ready(settling, 300.0, part) == ["a"]


def test_what_was_there_at_the_start_is_spared_the_wait_if_all_of_it_is_old() -> None:
    settling = Settling(5.0)
    settling.saw(seen("a", 1, changed=1000.0), 0.0)
    settling.saw(seen("b", 2, changed=900.0), 0.0)
    settling.saw(seen("part", 3, whole=False, changed=1060.0), 0.0)
    settling.were_still(0.0, 1060.0)
    assert [s.path for s in settling.take(0.0)] == ["a", "b"]


def test_one_young_model_has_all_wait_so_that_they_come_in_order() -> None:
    settling = Settling(5.0)
    settling.saw(seen("a", 1, changed=1001.0), 0.0)
    settling.saw(seen("b", 2, changed=900.0), 0.0)
    settling.were_still(0.0, 1060.0)
    assert settling.take(0.0) == []
    assert ready(settling, 5.0, seen("a", 1), seen("b", 2)) == ["a", "b"]


def test_a_long_settle_time_asks_for_older_models() -> None:
    settling = Settling(3600.0)
    settling.saw(seen("a", 1, changed=0.0), 0.0)
    settling.were_still(0.0, 3599.0)
    assert settling.take(0.0) == []
    settling.were_still(0.0, 3600.0)
    assert [s.path for s in settling.take(0.0)] == ["a"]


@given(st.lists(st.tuples(st.floats(0.01, 10.0), st.integers(0, 2)), min_size=1, max_size=30))
def test_never_ready_within_the_settle_time_of_a_change(steps: list[tuple[float, int]]) -> None:
    settling, now, version, changed = Settling(3.0), 0.0, -1, 0.0
    for wait, next_version in steps:
        now += wait
        if next_version != version:
            version, changed = next_version, now
        if ready(settling, now, seen("a", version)):
            assert changed + 3.0 <= now
