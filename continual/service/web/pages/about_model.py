"""The page of a model: what became of it and why, its records, what can be done."""

from __future__ import annotations

from continual.service.web.pages.markup import (
    Html,
    TypedCommand,
    commands,
    escape,
    facts,
    name,
    paragraph,
    section,
    table,
    to_fold,
)
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.recalled import AboutModel
from continual.texts import size, when

FATES = {
    "folded": "It is in the merge.",
    "refused": "It is kept out: a gate refused it.",
    "duplicate": "It is kept out: the merge has this model already.",
    "expired": "It is kept out: no round let it in for so long that it does not wait any more.",
    "rolled-back": "It was in the merge, and going back to an earlier record took it out.",
    "unfolded": "It was in the merge, and somebody took it out.",
    "deferred": "It waits for a round.",
    "open": "It has no fate now.",
}


def render(about: AboutModel, controls: Html, around: Around) -> str:
    """The page; `controls`: what can be done here."""
    tag = "good" if about.fate in ("folded", "deferred", "open") else "bad"
    head = (
        f'<header><h1>{name(about.name)}</h1><span class="tag {tag}">{escape(about.fate)}</span></header>'
        f"<p>{escape(FATES.get(about.fate, about.fate))}</p>"
    )
    return document(
        Frame("", about.name[:100], around),
        section("model", "", head, _why(about), _fold(about)),
        section("todo", "What can be done", controls, commands(todo(about), around.state)),
        section("records", "Records about it", _records(about)),
        section("names", "Names", _names(about)),
    )


def _why(about: AboutModel) -> Html:
    if about.fate == "folded" or not (about.reason or about.message):
        return Html()
    reason = f"<b>{escape(about.reason)}</b>: " if about.reason else ""
    told = f"<p>{reason}{escape(about.message or '')}</p>"
    if about.settings:
        values = ", ".join(f"{key} = {value}" for key, value in about.settings.items())
        told += f"<p>It went by {escape(values)}: with other values it is looked at again by itself.</p>"
    return Html(told)


def _fold(about: AboutModel) -> Html:
    if about.fold is None:
        return Html()
    shown = about.fold.shown
    return Html(
        f"<p>Folded as record {to_fold(shown.seq, about.fold.part)} at {when(shown.time)}: "
        f"{to_fold(shown.seq, about.fold.part, 'what it changed, and its share today')}.</p>"
    )


def todo(about: AboutModel) -> list[TypedCommand]:
    """What a person can type about a model."""
    if about.fate == "folded" and about.settled is not None:
        word = str(about.settled)
        return [
            TypedCommand(("unfold", word, "--dry-run"), "says what taking it out takes"),
            TypedCommand(("unfold", word), "takes it out of the merge again"),
        ]
    if about.settled is None:
        return [TypedCommand(("log",), "lists what was recorded")]
    word = str(about.settled)
    found = [TypedCommand(("retry", word), "has it looked at again")]
    if about.fate in ("refused", "duplicate", "expired"):
        found.append(TypedCommand(("quarantine", "show", word), "shows the record that says why"))
        because = ("quarantine", "accept", word, "--because", "WHY")
        found.append(TypedCommand(because, "has it folded though its figures are unlikely, and says why in the ledger"))
        found.append(TypedCommand(("quarantine", "drop", word), "takes it off the list of what is kept out"))
    return found


def _records(about: AboutModel) -> Html:
    rows = (
        (
            to_fold(one.seq) if one.kind == "fold" else one.seq,
            when(one.time),
            one.kind,
            one.fate,
            one.reason,
            one.message,
        )
        for one in about.records
    )
    more = about.count - len(about.records)
    told = table(("record", "when", "kind", "fate", "reason", "what"), rows)
    return Html(told + (paragraph(f"and {more} older ones") if more > 0 else ""))


def _names(about: AboutModel) -> Html:
    return facts(
        [
            ("name", about.name),
            ("origin", about.origin),
            ("key", about.key),
            ("form", f"{about.form}, {size(about.nbytes)}"),
            ("licence", about.licence or "not said"),
        ],
        "names",
    )
