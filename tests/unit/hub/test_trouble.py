"""Headers of a server that means no good: each is read strictly, or as if it were not there."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.hub.trouble import LONGEST_WAIT, Failed, next_of, span_of, wait_of

END = "https://hub.example"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "40"}, 40.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after": "9" * 12}, LONGEST_WAIT),
        ({"retry-after": "9" * 400}, 0.0),
        ({"retry-after": "9" * 5000}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "NaN"}, 0.0),
        ({"retry-after": "inf"}, 0.0),
        ({"retry-after": "1e9"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 0.0),
        ({"retry-after": "٣"}, 0.0),
        ({"retry-after": ""}, 0.0),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, 0.0),
        ({"ratelimit": f'"api";r=0;t={"9" * 400}'}, LONGEST_WAIT),
        ({"ratelimit": f'"api";r={"9" * 5000};t=5'}, 0.0),
        ({"ratelimit": '"api";r=0;t=-1'}, 0.0),
        ({"ratelimit": "r" * 1_000_000}, 0.0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wait_is_a_number_of_seconds_and_at_most_an_hour(headers: dict[str, str], seconds: float) -> None:
    assert wait_of(headers) == seconds


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("bytes 0-9/10", (0, 9, 10)),
        ("bytes 0-9/*", None),
        ("bytes */10", None),
        ("bytes -5-9/10", None),
        ("bytes 0-9/10, 11-12/13", None),
        ("items 0-9/10", None),
        (f"bytes 0-9/{'9' * 400}", None),
        ("", None),
    ],
)
def test_a_range_is_what_it_says(text: str, span: tuple[int, int, int] | None) -> None:
    assert span_of(text) == span


@pytest.mark.parametrize(
    ("link", "page"),
    [
        ("", None),
        ('<https://hub.example/api/models?cursor=x>; rel="next"', "/api/models?cursor=x"),
        ('<https://evil.example/api/models?cursor=x>; rel="next"', "/api/models?cursor=x"),
        ('<//evil.example/a>; rel="next"', "/a"),
        ('<?cursor=x>; rel="next"', "/api/models?cursor=x"),
        ('<http://h/a>; rel="prev", <http://h/b>; rel="next"', "/b"),
        ('<http://h/a>; rel="nextish"', None),
        ("<" * 100_000, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_the_next_page_is_at_the_endpoint_whoever_is_named(link: str, page: str | None) -> None:
    assert next_of(link, f"{END}/api/models", END) == (None if page is None else END + page)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "mailto:a", "http://[", "data:x", "a" * 10_000])
def test_a_next_page_that_is_no_address_of_the_endpoint_goes_nowhere_else(address: str) -> None:
    try:
        found = next_of(f'<{address}>; rel="next"', f"{END}/api/models", END)
    except Failed:
        return
    assert found is not None
    assert found.startswith(f"{END}/")


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_header_gives_a_wait_that_can_be_waited_and_no_other_error(one: str, other: str) -> None:
    assert 0.0 <= wait_of({"retry-after": one, "ratelimit": other}) <= LONGEST_WAIT
    assert 0.0 <= wait_of({"ratelimit": other}) <= LONGEST_WAIT
    assert math.isfinite(wait_of({"retry-after": other}))
    span_of(one)
    with contextlib.suppress(Failed):
        next_of(one, END, END)
