"""Which settings are in force, and where each was set, without what nobody is to see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit, urlunsplit

from continual import gates
from continual.config.given import Looked
from continual.texts import jsonable

MASK = "**********"
_SECRETS = r"(?:secret|token|password|passwd|api[-_]?key|credential|authorization)s?"
_SECRET = re.compile(rf"(?:^|[^a-z0-9]){_SECRETS}(?:$|[^a-z0-9])")
"""Names of settings, and flags of commands, whose values are shown to nobody: `promote_token`, but not `tokenizer`."""
_TOLD = re.compile(rf"({_SECRETS}\s*[=:]\s*(?:bearer\s+|basic\s+)?|\b(?:bearer|basic)\s+)([^\s&;,\"']+)", re.IGNORECASE)
"""A secret in a text, behind its name."""


def shown(looked: Looked) -> list[dict[str, object]]:
    """Every setting by its whole name, with its value and where it was set; secrets are masked."""
    settings = looked.settings
    values = dict(_flat("", settings.model_dump(mode="json")))
    values |= {name: jsonable(value) for name, value in gates.make(settings).values.items() if name.startswith("gates")}
    return [
        {"setting": name, "value": _masked(name, value), "from": _from(name, looked.where)}
        for name, value in sorted(values.items())
    ]


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The leaves of nested tables, by their whole names; an empty table is one."""
    if not isinstance(value, Mapping) or not value:
        yield name, value
        return
    for key, one in value.items():
        yield from _flat(f"{name}.{key}" if name else str(key), one)


def _from(name: str, where: Mapping[str, str]) -> str:
    """Where the setting was set, or the table that it lies in."""
    parts = name.split(".")
    found = (where.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
    return next((place for place in found if place is not None), "default")


def _masked(name: str, value: object) -> object:
    """The value without what nobody is to see."""
    if isinstance(value, Mapping):
        return {key: _masked(f"{name}.{key}", one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        before = ("", *value)
        return [
            MASK if str(flag).startswith("-") and "=" not in str(flag) and _is_secret(str(flag)) else _masked(name, one)
            for flag, one in zip(before, value, strict=False)
        ]
    if value and _is_secret(name.rpartition(".")[2]):
        return MASK
    return _TOLD.sub(rf"\g<1>{MASK}", _public(value)) if isinstance(value, str) else value


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.lower()) is not None


def _public(text: str) -> str:
    """An address without what may bear a secret: who asks, and the query."""
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
        at = parts.netloc.rpartition("@")[2]
    except ValueError:
        return MASK
    bare = parts._replace(
        netloc=at if at == parts.netloc else f"{MASK}@{at}", query=MASK if parts.query else "", fragment=""
    )
    return urlunsplit(bare)
