"""What the cursor of the Hub misses and gives twice: nothing, whatever order and times a listing has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import Retry
from continual.hub import Info
from continual.sources.cursor import OVERLAP, Cursor, Rest, Sieve, Sighting

NOW = 1_800_000_000.0


def info(repo: str, sha: str = "1", at: float = NOW, **facts: object) -> Info:
    return Info(repo, sha * 40, datetime.fromtimestamp(at, UTC), **facts)  # type: ignore[arg-type]


def none(_key: str) -> bool:
    return False


def every(_info: Info) -> bool:
    return True


def take(
    cursor: Cursor, rows: list[Info], now: float = NOW, *, all_: bool = False, known: set[str] | None = None
) -> int:
    return cursor.read("l", iter(rows), now, Sieve(lambda key: key in (known or ()), every), all_=all_)


def test_reading_stops_a_little_before_what_was_new_last_time() -> None:
    cursor, asked = Cursor(), []

    def rows(*times: float) -> Iterator[Info]:
        for number, time in enumerate(times):
            asked.append(time)
            yield info(f"o/m{number}-{time}", at=time)

    cursor.read("l", rows(NOW, NOW - 5000), NOW, Sieve(none, every), all_=False)
    assert asked == [NOW, NOW - 5000]  # the first time to the end
    asked.clear()
    cursor.read("l", rows(NOW + 10, NOW - OVERLAP, NOW - OVERLAP - 1, NOW - 9000), NOW, Sieve(none, every), all_=False)
    assert asked == [NOW + 10, NOW - OVERLAP, NOW - OVERLAP - 1]
    asked.clear()
    cursor.read("l", rows(NOW - 9000, NOW - 9001), NOW, Sieve(none, every), all_=True)
    assert len(asked) == 2


def test_ties_moves_and_late_rows() -> None:
    cursor = Cursor()
    assert take(cursor, [info("o/a"), info("o/b")]) == 2
    assert take(cursor, [info("o/c"), info("o/a"), info("o/b")]) == 1  # a tie that came later
    assert take(cursor, [info("o/a", "2", NOW + 1), info("o/c"), info("o/b")]) == 1  # a moved up
    assert take(cursor, [info("o/d", at=NOW - 100), info("o/b", at=NOW - 200)]) == 1  # d was not listed at its time
    assert {s.key for s in cursor.ready(NOW + 100, 0.0)} == {
        f"hub:{r}@{s * 40}" for r, s in (("o/a", "1"), ("o/a", "2"), ("o/b", "1"), ("o/c", "1"), ("o/d", "1"))
    }


def test_a_page_that_fails_moves_nothing_but_keeps_what_was_seen() -> None:
    cursor = Cursor()
    take(cursor, [info("o/a", at=NOW - 10_000)])

    def broken() -> Iterator[Info]:
        yield info("o/b")
        raise Retry("page 2")

    with pytest.raises(Retry, match="page 2"):
        cursor.read("l", broken(), NOW, Sieve(none, every), all_=False)
    assert cursor.high == {"l": NOW - 10_000}
    assert f"hub:o/b@{'1' * 40}" in cursor.seen


def test_ready_once_after_the_commit_has_been_still() -> None:
    cursor = Cursor()
    take(cursor, [info("o/old", at=NOW - 1000), info("o/new", at=NOW - 10), info("o/ahead", at=NOW + 5000)])
    assert [s.repo for s in cursor.ready(NOW, 60.0)] == ["o/old"]
    assert cursor.next_ready(NOW, 60.0) == pytest.approx(50.0)
    assert [s.repo for s in cursor.ready(NOW + 60, 60.0)] == [
        "o/new",
        "o/ahead",
    ]  # a clock that is ahead does not hold it up
    assert cursor.ready(NOW + 999, 60.0) == []
    assert cursor.next_ready(NOW + 999, 60.0) is None


def test_other_settings_read_everything_again_and_forget_nothing() -> None:
    cursor = Cursor(asked="a")
    take(cursor, [info("o/a")])
    kept = Cursor.of(cursor.body(), "a")
    assert (kept.high, kept.swept, kept.seen) == (cursor.high, cursor.swept, cursor.seen)
    other = Cursor.of(cursor.body(), "b")
    assert (other.high, other.swept, other.seen) == ({}, {}, cursor.seen)


def test_a_commit_dated_ahead_hides_nothing() -> None:
    cursor = Cursor()
    take(cursor, [info("o/ahead", at=NOW + 9000)])
    assert take(cursor, [info("o/ahead", at=NOW + 9000), info("o/now", at=NOW + 1)], now=NOW + 2) == 1


def test_settled_ones_are_forgotten_and_not_taken_again() -> None:
    cursor, key = Cursor(), f"hub:o/a@{'1' * 40}"
    take(cursor, [info("o/a")])
    cursor.ready(NOW + 99, 0.0)
    cursor.done(key)
    assert take(cursor, [info("o/a")], known={key}) == 0
    assert cursor.seen == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), min_size=1, max_size=25),
    st.integers(1, 20),
)
def test_whatever_is_committed_is_given_exactly_once_also_over_restarts(
    steps: list[tuple[int, int, bool]], restart: int
) -> None:
    """Commits in any order with tied times; between them polls, some of which see only a part of the list; a restart
    from what was kept."""
    cursor, heads, given_, made, now = Cursor(), dict[str, Info](), list[str](), set[str](), NOW
    for number, (repo, pause, polls) in enumerate(steps):
        now += pause
        head = info(f"o/{repo}", f"{number % 10}", at=now)
        heads[head.id] = Info(head.id, f"{number:040x}", head.modified)
        made.add(f"hub:{head.id}@{number:040x}")
        if polls:
            rows = sorted(heads.values(), key=lambda i: i.modified, reverse=True)
            cursor.read("l", iter(rows), now, Sieve(lambda key: key in given_, every), all_=False)
            for sighting in cursor.ready(now, 0.0):
                given_.append(sighting.key)
                cursor.done(sighting.key)
        if number == restart:
            cursor = Cursor.of(cursor.body())
    rows = sorted(heads.values(), key=lambda i: i.modified, reverse=True)
    cursor.read("l", iter(rows), now, Sieve(lambda key: key in given_, every), all_=False)
    given_ += [s.key for s in cursor.ready(now, 0.0)]
    assert len(given_) == len(set(given_))
    assert {f"hub:{i.id}@{i.sha}" for i in heads.values()} <= set(given_) <= made


def test_a_push_without_a_commit_has_a_key_of_its_own() -> None:
    cursor = Cursor()
    assert cursor.saw(Sighting("o/a", None, NOW, NOW, "webhook"), none)
    assert not cursor.saw(Sighting("o/a", None, NOW, NOW, "webhook"), none)
    assert cursor.saw(Sighting("o/a", "1" * 40, NOW, NOW), none)


def many(*times: float) -> list[Info]:
    """A row for each of these times."""
    return [info(f"o/m{at}", at=at) for at in times]


def test_ten_thousand_settled_repos_are_passed_over_and_a_new_one_is_ready_at_once() -> None:
    settled = many(*(NOW - n for n in range(10_000)))
    keys = {f"hub:{info.id}@{info.sha}" for info in settled}
    cursor = Cursor()
    assert cursor.read("l", settled, NOW, Sieve(keys.__contains__, every), all_=True) == 0
    assert cursor.seen == {}
    cursor = Cursor.of(json.loads(json.dumps(cursor.body())))  # after a restart
    new = info("o/new", "f", NOW + 1)
    assert cursor.read("l", [new, *settled], NOW + 2, Sieve(keys.__contains__, every), all_=False) == 1
    assert [s.repo for s in cursor.ready(NOW + 100, 0.0)] == ["o/new"]
    assert cursor.ready(NOW + 100, 0.0) == []
    assert cursor.next_ready(NOW + 100, 0.0) is None


def test_a_read_that_is_cut_off_leaves_a_rest_down_to_where_it_would_have_gone() -> None:
    cursor, sieve = Cursor(), Sieve(none, every)
    cursor.read("l", many(NOW, NOW - 10), NOW, sieve, all_=True, cut=lambda: "/p2")
    assert cursor.rests == {"l": Rest("/p2", None)}
    assert not cursor.sweeps("l", NOW + 1e9, 10.0), "one is under way"
    cursor.read("l", many(NOW + 5000, NOW + 4000), NOW + 5000, sieve, all_=False, cut=lambda: "/q1")
    assert cursor.rests == {"l": Rest("/q1", None)}, "down to the end still"
    cursor.read_on("l", many(NOW + 3000), NOW + 5000, sieve, lambda: "/q2")
    assert Cursor.of(json.loads(json.dumps(cursor.body()))).rests == {"l": Rest("/q2", None)}
    cursor.read_on("l", many(NOW - 9999), NOW + 5000, sieve, lambda: None)
    assert (cursor.rests, cursor.swept) == ({}, {"l": NOW + 5000})
    cursor.read("l", many(NOW + 9000), NOW + 9000, sieve, all_=False, cut=lambda: "/r1")
    assert cursor.rests == {"l": Rest("/r1", NOW + 5000 - OVERLAP)}
    assert cursor.sweeps("l", NOW + 9000, 10.0)
    assert cursor.read_on("l", many(NOW + 8000, NOW + 4000, NOW + 3999), NOW + 9000, sieve, lambda: None) == 1
    assert (cursor.rests, cursor.swept) == ({}, {"l": NOW + 5000})
    assert Cursor.of(cursor.body() | {"rests": {"l": ["/p", None]}}, "other settings").rests == {}
