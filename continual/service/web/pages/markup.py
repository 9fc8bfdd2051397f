"""The words of HTML that all pages use: escaped text, links, tables, commands. What is no `Html` is escaped where it
goes into a page, so nothing from outside gets into one as it is."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import urlencode

from continual.texts import plain

LONGEST = 200
"""Characters of a model's name that are shown in a list."""
_WIDE = ("why", "what", "left out", "warned", "where", "seen", "place", "value")
_NUMBERS = (
    "wrong",
    "record",
    "when",
    "failed",
    "next try",
    "since",
    "norm",
    "cosine",
    "score",
    "z",
    "weight",
    "kept",
    "interference",
    "cut at fold",
    "cut by now",
    "share",
    "change",
    "bytes",
    "merge norm",
    "records",
    "tensors",
    "lost before",
    "cores",
    "memory",
    "GPUs",
    "orders",
    "read",
    "time of work",
    "last heard of",
)
_BARS = ("share", "change")
"""Columns of percentages that are also drawn."""


class Html(str):
    """Text that is HTML already: it goes into a page as it is."""

    __slots__ = ()


def escape(text: str, limit: int = 2000) -> Html:
    """A text from outside as HTML; control characters, marks of direction and bytes that are no UTF-8 as escapes that
    can be seen."""
    return Html(html.escape(plain(text, limit)))


def shown(value: object) -> Html:
    """A value as HTML: escaped, unless it is HTML; nothing for None."""
    return value if isinstance(value, Html) else Html() if value is None else escape(str(value))


def join(parts: Iterable[str], by: str = "") -> Html:
    """Pieces of HTML one after the other."""
    return Html(by.join(parts))


def name(text: str | None) -> Html:
    """A model's name, which turns nothing around it, whatever its script."""
    return Html(f"<bdi>{escape(text or '', LONGEST)}</bdi>")


def link(path: str, text: object) -> Html:
    """A link to a page of ours."""
    return Html(f'<a href="{escape(path)}">{shown(text)}</a>')


def query(**values: object) -> str:
    """The part of an address after its path; empty values are left out."""
    given = {
        key: str(value).encode("utf-8", "surrogatepass") for key, value in values.items() if value not in (None, "")
    }
    return f"?{urlencode(given)}" if given else ""


def to_fold(seq: int, part: int = 0, text: object = None) -> Html:
    """A link to the page of a fold."""
    return link(f"/folds/{seq}{query(part=part or None)}", seq if text is None else text)


def to_model(identity: str, called: str | None) -> Html:
    """A link to the page of a model."""
    return link(f"/models/{identity}", name(called)) if identity else name(called)


def paragraph(text: object, kind: str = "") -> Html:
    """A paragraph, of a class where `kind` says it."""
    return Html(f"<p{_class(kind)}>{shown(text)}</p>")


def section(called: str, title: str, *content: str) -> Html:
    """A part of a page with a heading. By its name, `called`, it is exchanged alone where something in it changed."""
    head = f'<h2 id="{called}-title">{escape(title)}</h2>' if title else ""
    by = f' aria-labelledby="{called}-title"' if title else ""
    return Html(f'<section data-live="{called}"{by}>{head}{"".join(content)}</section>')


def facts(rows: Iterable[tuple[str, object]], kind: str = "cards") -> Html:
    """Names and values, one beside the other."""
    told = "".join(f"<div><dt>{escape(key)}</dt><dd>{shown(value)}</dd></div>" for key, value in rows)
    return Html(f'<dl class="{kind}">{told}</dl>')


def items(rows: Iterable[object]) -> Html:
    """A list of sentences; nothing where there are none."""
    told = "".join(f"<li>{shown(row)}</li>" for row in rows if row)
    return Html(f"<ul>{told}</ul>" if told else "")


class TypedCommand(NamedTuple):
    """What a person can type: the words, and what that does."""

    words: Sequence[str]
    does: str


def commands(rows: Sequence[TypedCommand], state: str) -> Html:
    """Commands to copy, each with what it does; of the state in the directory `state`."""
    told = []
    for row in rows:
        line = " ".join(["continual", *map(_word, (*row.words, "--state", state))])
        told.append(f'<li><code class="command">{escape(line)}</code><span>{escape(row.does)}</span></li>')
    return Html(f'<ul class="todo">{"".join(told)}</ul>')


def _word(word: str) -> str:
    """A word as a shell takes it. What cannot be shown could not be typed either."""
    return shlex.quote(word) if word.isprintable() else "NAME"


def bar(percent: str) -> Html:
    """A percentage as a bar, at most full; the figure stands beside it."""
    return Html(f'<meter aria-hidden="true" max="100" value="{percent.removesuffix(" %") or 0}"></meter>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """A table. On a narrow screen each row is a card: every cell has the name of its column."""

    def cell(column: str, value: object) -> str:
        kind = "wide" if column in _WIDE else "n" if column in _NUMBERS else ""
        text = shown(value)
        drawn = bar(text) if column in _BARS and text else ""
        return f'<td{_class(kind)} data-label="{escape(column)}">{text}{drawn}</td>'

    top = "".join(f'<th scope="col">{escape(column)}</th>' for column in head)
    lines = "".join(f"<tr>{''.join(map(cell, head, row))}</tr>" for row in rows)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(f"<table>{told}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>")


def finder(path: str, search: str, label: str) -> Html:
    """A form to search in a list."""
    clear = f' <a href="{path}">show all</a>' if search else ""
    return Html(
        f'<form class="find" role="search" method="get" action="{path}"><label for="q">{escape(label)}</label> '
        f'<input id="q" name="q" type="search" maxlength="500" value="{escape(search)}"> '
        f'<button type="submit">Search</button>{clear}</form>'
    )


def pager(path: str, search: str, before: int | None, *, first: bool) -> Html:
    """Links to the newest rows and to older ones."""
    newest = "" if first else f'<a href="{escape(path + query(q=search))}">newest</a>'
    older = "" if before is None else f'<a rel="next" href="{escape(path + query(q=search, before=before))}">older</a>'
    return Html(f'<nav class="pages" aria-label="Pages of this list">{newest} {older}</nav>' if newest or older else "")


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
