"""Which strings name a repo of the Hub, and at which revision."""

from __future__ import annotations

import pytest

from continual.hub.names import named


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", ("org/name", None)),
        ("hf://org/name", ("org/name", None)),
        ("hf://name", ("name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@" + "a" * 40, ("org/name", "a" * 40)),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name/more", None),
        ("org/../name", None),
        ("org/name@", None),
        ("org/name@../x", None),
        ("hf://org/na me", None),
        ("org/name\n", None),
    ],
)
def test_names(text: str, found: tuple[str, str | None] | None) -> None:
    assert named(text) == found
