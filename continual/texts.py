"""How values are written, for people and for machines: a text from outside, a size, a time, a duration, a figure, a
scale, a record.

The command line and the service both use these functions, so that they write the same thing. What is printed, and
where, they decide themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from continual.state import Commit

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What a JSON document can hold."""


LONGEST = 2000
"""Characters of a text from outside that are shown."""


def plain(text: str, limit: int = LONGEST, *, lines: bool = False) -> str:
    """`text` as it can be shown on a terminal, in a log and on a page, wherever it came from.

    What is no letter, sign or plain space becomes an escape that can be seen, as `\\x1b`: control characters, escapes,
    marks that turn the direction of writing or take no room, lone surrogates, line ends (unless `lines` keeps `\\n`).
    What is longer than `limit` is cut, and its length is said.
    """
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(
            c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in shown
        )
    return shown if max(len(text), len(shown)) <= limit else f"{shown[:limit]}… ({len(text)} characters)"


def size(nbytes: float) -> str:
    """Bytes in decimal units with three figures: `950 B`, `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def when(time: str) -> str:
    """A time of a record (RFC 3339, UTC) without the parts of a second."""
    return time[:19] + "Z"


def minute(time: str) -> str:
    """A time of a record to the minute, with its zone: `2026-11-27 22:54Z`."""
    return f"{time[:10]} {time[11:16]}Z"


def paused_since(since: str | None) -> str:
    """That folding is paused, since when, and how it goes on; empty where it is not."""
    if since is None:
        return ""
    return f"folding is paused{f' since {when(since)}' if since else ''}; 'continual resume' goes on"


def duration(seconds: float) -> str:
    """A time span in its two largest units: `2 d 3 h`, `4 min 10 s`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if h:
        return f"{h} h {m} min"
    return f"{m} min {s} s" if m else f"{s} s"


def figure(value: float | None, form: str = "+.3g") -> str:
    """A number in the format `form`, or an empty text for None."""
    return "" if value is None else format(value, form)


def share(value: float | None) -> str:
    """A share in percent, `12.3 %`; an empty text for None, and what is not zero is never shown as 0."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if value == 0 or value >= 0.0005 else f"{100 * value:.1g} %"


def scale(text: str, tuned: Mapping[str, int] | None) -> str:
    """The scale in force; where `continual tune` chose it (`tuned`), with the record that did and how many models were
    folded then."""
    return f"{text} (tuned at record {tuned['record']}, when {tuned['folds']} were folded)" if tuned else text


def jsonable(value: object) -> Json:
    """`value` as JSON can hold it: records and mappings become objects, tuples become lists, and what else JSON does
    not know (a path, a place) becomes its text. Lone surrogates, which stand for bytes that are no UTF-8, become
    escapes that can be seen: no encoder of JSON takes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_seen(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _seen(str(value))


def _seen(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def record(commit: Commit) -> dict[str, Json]:
    """A record of the ledger for machines, as `continual log --json` and `/api/log` give it."""
    body = commit.shown()
    place = ("seq", "time", "generation", "prev")
    first = {**{key: body[key] for key in place}, "crc": commit.crc}
    return {key: jsonable(value) for key, value in {**first, **body}.items() if key != "receipts"}
