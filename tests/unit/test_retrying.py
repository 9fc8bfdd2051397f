"""The one retry policy, as tables."""

from __future__ import annotations

import pytest

from continual.retrying import (
    PARKED_AFTER,
    TRIES,
    Fault,
    avoided_for,
    fault_of,
    next_poll,
    next_try,
    order_bound,
    retry_delay,
)


@pytest.mark.parametrize(
    ("status", "code", "fault"),
    [
        (None, None, Fault.TRANSPORT),
        (429, None, Fault.RATE),
        (500, None, Fault.SERVER),
        (502, None, Fault.SERVER),
        (503, None, Fault.SERVER),
        (408, None, Fault.SERVER),
        (403, "GatedRepo", Fault.GATED),
        (401, "GatedRepo", Fault.GATED),
        (401, "RepoNotFound", Fault.GONE),  # a private repo, to strangers
        (404, "RevisionNotFound", Fault.GONE),
        (404, "EntryNotFound", Fault.GONE),
        (404, None, Fault.GONE),
        (410, None, Fault.GONE),
        (401, None, Fault.TOKEN),
        (403, None, Fault.DENIED),
        (409, None, Fault.CONFLICT),
        (412, None, Fault.CONFLICT),
        (400, None, Fault.REQUEST),
        (422, None, Fault.REQUEST),
    ],
)
def test_what_went_wrong(status: int | None, code: str | None, fault: Fault) -> None:
    assert fault_of(status, code) is fault


@pytest.mark.parametrize(
    ("fault", "attempt", "luck", "after", "wait"),
    [
        (Fault.TRANSPORT, 1, 0.5, 0.0, 0.5),
        (Fault.TRANSPORT, 2, 0.5, 0.0, 1.0),
        (Fault.TRANSPORT, 3, 0.0, 0.0, 1.0),
        (Fault.TRANSPORT, 3, 1.0, 0.0, 3.0),
        (Fault.SERVER, TRIES - 1, 0.5, 0.0, 4.0),
        (Fault.SERVER, TRIES, 0.5, 0.0, None),  # told to whoever needs it
        (Fault.RATE, 1, 0.5, 12.0, 12.0),  # what the server asks for
        (Fault.RATE, 1, 0.5, 31.0, None),  # is left to the queue
        (Fault.GONE, 1, 0.5, 0.0, None),
        (Fault.GATED, 1, 0.5, 0.0, None),
        (Fault.TOKEN, 1, 0.5, 0.0, None),
        (Fault.CONFLICT, 1, 0.5, 0.0, None),
        (Fault.REQUEST, 1, 0.5, 0.0, None),
    ],
)
def test_when_a_request_is_made_again(
    fault: Fault, attempt: int, luck: float, after: float, wait: float | None
) -> None:
    assert next_try(fault, attempt, luck, after) == wait


@pytest.mark.parametrize(
    ("attempt", "after", "parks", "wait"),
    [
        (1, 0.0, True, 5.0),
        (2, 0.0, True, 10.0),
        (7, 0.0, True, 300.0),
        (PARKED_AFTER, 0.0, True, 300.0),
        (PARKED_AFTER + 1, 0.0, True, 3600.0),
        (1000, 0.0, False, 300.0),
        (1, 55.0, True, 55.0),
        (7, 55.0, True, 300.0),
    ],
)
def test_when_a_candidate_comes_again(attempt: int, after: float, parks: bool, wait: float) -> None:
    assert retry_delay(attempt, after, parks=parks) == wait


@pytest.mark.parametrize(
    ("failures", "luck", "after", "refused", "wait"),
    [
        (0, 0.5, 0.0, 0, 300.0),
        (0, 0.0, 0.0, 0, 270.0),
        (0, 1.0, 0.0, 0, 330.0),
        (1, 0.5, 0.0, 0, 75.0),
        (3, 0.5, 0.0, 0, 300.0),
        (50, 0.5, 0.0, 0, 3600.0),
        (1, 0.0, 0.0, 0, 56.25),  # many daemons that failed at once do not come again at once
        (1, 1.0, 0.0, 0, 93.75),
        (3, 0.0, 0.0, 0, 225.0),
        (3, 1.0, 0.0, 0, 375.0),
        (50, 0.0, 0.0, 0, 2700.0),
        (50, 1.0, 0.0, 0, 4500.0),
        (1, 0.0, 500.0, 0, 500.0),
        (1, 0.5, 500.0, 0, 500.0),
        (2, 0.5, 0.0, 2, 150.0),
        (3, 0.5, 0.0, 3, 3600.0),  # a token that is refused three times in a row waits for a person
    ],
)
def test_when_the_hub_is_polled_again(failures: int, luck: float, after: float, refused: int, wait: float) -> None:
    assert next_poll(300.0, failures, luck, after=after, refused=refused) == pytest.approx(wait)


def test_rare_polls_do_not_become_more_frequent_by_failing() -> None:
    assert next_poll(7200.0, 30, 0.5) == pytest.approx(7200.0)


def test_for_how_long_a_machine_is_avoided() -> None:
    assert [avoided_for(times) for times in (1, 2, 3, 4, 5, 10**6)] == [300, 600, 1200, 2400, 3600, 3600]


@pytest.mark.parametrize(
    ("slowest", "ended", "bound"),
    [(0.0, 0, 1800), (4.0, 0, 1800), (860.0, 0, 8600), (4.0, 1, 7200), (4.0, 2, 28800), (860.0, 1, 34400)],
)
def test_how_long_an_order_may_take(slowest: float, ended: int, bound: float) -> None:
    assert order_bound(slowest, ended) == bound
    assert order_bound(slowest, ended, 3_000_000_000) == bound
    assert order_bound(slowest, ended, 40_000_000_000) == max(bound, 20_000 * 4**ended)
