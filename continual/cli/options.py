"""From what is typed to what the API takes: rule options."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

from continual.errors import Misconfigured


def parse_options(pairs: Sequence[str]) -> dict[str, object]:
    """Fold-time options of a rule from `key=value` pairs. A value is read as TOML where it is that, else as text.
    Raises Misconfigured for what is no pair."""
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise Misconfigured(f"option {pair!r}: write it as key=value, as alpha=0.5")
        try:
            options[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = value.strip()
    return options
