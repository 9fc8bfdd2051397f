"""The page of a fold: its figures in words, what it changed by layers, its share today, what can be done."""

from __future__ import annotations

from continual.service.web.pages import evaluations, in_words
from continual.service.web.pages.markup import (
    Html,
    TypedCommand,
    commands,
    escape,
    facts,
    items,
    link,
    name,
    paragraph,
    section,
    table,
    to_fold,
    to_model,
)
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.recalled import AboutFold, GroupChange
from continual.texts import figure, share, size, when


def render(about: AboutFold, controls: Html, around: Around) -> str:
    """The page; `controls`: what can be done here."""
    shown = about.fold.shown
    frame = Frame("", f"Fold {shown.seq}: {shown.model or ''}"[:100], around)
    return document(
        frame,
        section("fold", "", _head(about)),
        section("words", "What the figures say", items(in_words.of_fold(about)), _measured(about)),
        section("layers", "What it changed, by layers", _layers(about.groups)),
        _warnings(about),
        _evaluated(about),
        section("todo", "What can be done", controls, commands(todo(about), around.state)),
        section("names", "Names", _names(about)),
    )


def _head(about: AboutFold) -> Html:
    shown = about.fold.shown
    tag = "good" if about.fold.in_force else "bad"
    beside = [
        "" if about.older is None else Html(f'<a rel="prev" href="/folds/{about.older}">the fold before</a>'),
        "" if about.newer is None else Html(f'<a rel="next" href="/folds/{about.newer}">the fold after</a>'),
    ]
    brought = {"combine": "It came with another state.", "select": "A round let it in."}.get(about.kind, "")
    return Html(
        f'<header><h1>Fold {shown.seq}: {name(shown.model)}</h1><span class="tag {tag}">{escape(about.fold.fate)}'
        f'</span></header><p>Folded {when(shown.time)}. {brought}</p><nav class="pages" aria-label="Folds beside it">'
        f"{' '.join(beside)} {link('/folds', 'all folds')} {to_model(shown.model_id, 'all about the model')}</nav>"
    )


def _measured(about: AboutFold) -> Html:
    """What the rule measured, by its own names."""
    found = {**about.notes, **about.gauges}
    return facts((key, f"{value:.4g}") for key, value in found.items()) if found else Html()


def _layers(groups: tuple[GroupChange, ...]) -> Html:
    if not groups:
        return paragraph("Its record does not say it.", "none")
    most = max(range(len(groups)), key=lambda number: groups[number].share)
    told = paragraph(f"Most of it, {share(groups[most].share)} of its energy, lies in {groups[most].name}.")
    cosines = any(one.cosine is not None for one in groups)
    head = ("layers", "norm", *(("cosine",) if cosines else ()), "share")
    rows = (
        (
            one.name,
            f"{one.norm:.4g}",
            *((figure(one.cosine or None, "+.3f"),) if cosines else ()),
            share(one.share),
        )
        for one in groups
    )
    return Html(told + table(head, rows))


def _warnings(about: AboutFold) -> Html:
    if not about.warnings:
        return Html()
    rows = ((one.gate, one.reason, one.message) for one in about.warnings)
    return section("warnings", "What gates warned of", table(("gate", "reason", "what"), rows))


def _evaluated(about: AboutFold) -> Html:
    if about.evaluated is None:
        return Html()
    return section("evaluated", "What the merge was worth with it", evaluations.one(about.evaluated))


def todo(about: AboutFold) -> list[TypedCommand]:
    """What a person can type about a fold."""
    seq = str(about.fold.shown.seq)
    alone = about.kind == "fold"
    word = seq if alone else about.fold.shown.model or ""
    found = []
    if about.fold.in_force:
        found.append(TypedCommand(("unfold", word, "--dry-run"), "says what taking it out takes"))
        found.append(TypedCommand(("unfold", word), "takes it out of the merge again"))
        found.append(TypedCommand(("explain",), "says what each model has in the merge, by layers"))
    elif alone:
        found.append(TypedCommand(("retry", seq), "has it looked at again"))
    if about.back:
        found.append(TypedCommand(("tag", "NAME", "--at", seq), "gives this record a name, and keeps what it holds"))
        found.append(TypedCommand(("rollback", seq, "--dry-run"), "says what going back to here undoes"))
        if about.older is not None:
            found.append(TypedCommand(("diff", str(about.older), seq), "says what it changed in the merge, by tensor"))
    found.append(TypedCommand(("show", seq), "shows the whole record"))
    return found


def _names(about: AboutFold) -> Html:
    tags = ", ".join(about.tags) or "none"
    back = "The state can still go back to this record." if about.back else "What this record held has expired."
    rows = [
        ("model", to_model(about.fold.shown.model_id, about.fold.shown.model)),
        ("origin", about.origin),
        ("key", about.key),
        ("digest", about.digest),
        ("form", f"{about.fold.shown.form}, {size(about.nbytes)}"),
        ("licence", about.licence or "not said"),
        ("tags", tags),
        ("record", to_fold(about.fold.shown.seq, about.fold.part)),
    ]
    return Html(facts(rows, "names") + paragraph(back))
