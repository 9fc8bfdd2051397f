"""By which names the service may be asked."""

from __future__ import annotations

import pytest

from continual.service.web.hosts import may_ask


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:8321", "10.1.2.3:80", "[::1]", "[::1]:8321", "::1", "localhost", "LocalHost:1"),
        *("localhost.", "box", "BOX:80", "merge.example.org", "merge.example.org.:443", None),
    ],
)
def test_addresses_and_names_that_are_known(host: str | None) -> None:
    assert may_ask(host, ("box", "Merge.example.org"))


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8321",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "",
            ":8321",
            "[",
            "[]",
        ),
        *("merge.example.org.evil.example", "notbox", "127.0.0.1@evil.example", "evil.example:80:80"),
        *("[::1]evil.example", "[::1", "localhost:evil", "localhost:1@evil.example", "[::1]:x"),
    ],
)
def test_all_others_are_strange(host: str) -> None:
    assert not may_ask(host, ("box", "merge.example.org"))
