"""The front page: health, what is done now, who waits, what came last."""

from __future__ import annotations

from collections.abc import Sequence

from continual.service.web.pages import on_cluster, out, record_tables
from continual.service.web.pages.markup import (
    Html,
    escape,
    facts,
    link,
    name,
    paragraph,
    section,
    table,
    to_model,
)
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.view import (
    ShownForm,
    ShownWaiting,
    Status,
    UnderWay,
)
from continual.sources.contract import SourceReport
from continual.sources.roster import title_of
from continual.texts import duration, figure, scale, share, size, when

_NEWEST = 8
"""Rows of folds and of refusals: what came last is to be seen at once, the rest has pages of its own."""


def render(status: Status, picture: Html, controls: Html, around: Around) -> str:
    """The page for `status`. `picture` shows what the newest folds changed, `controls` are what can be done."""
    frame = Frame("/", f"{status.health}: {status.folds} folded, continual", around, footer(status))
    return document(
        frame,
        section("health", "", _header(status)),
        section("figures", "", _cards(status)),
        controls,
        section("queue", "Queue", under_way(status.current), _queue(status)),
        on_cluster.cluster(status.cluster),
        *(_source(key, report) for key, report in status.sources.items() if report is not None),
        _notes(status.notes),
        _pool(status),
        section(
            "folds",
            "Last folds",
            picture,
            record_tables.folds(status.last_folds[:_NEWEST]),
            paragraph(link("/folds", "All folds, with a timeline and what each changed")),
        ),
        _merge(status),
        out.views(status),
        out.canaries(status.canaries),
        out.published(status.published),
        section(
            "refusals",
            "Last refusals",
            record_tables.refusals(status.refusals[:_NEWEST]),
            paragraph(link("/refusals", "All refusals, and what to do")),
        ),
    )


def _header(status: Status) -> Html:
    tag = "good" if status.health == "ok" else "bad"
    why = "" if status.degraded and status.health != "stopping" else status.why
    shown = (
        f'<header><h1>continual</h1><div role="status"><span class="tag {tag}">{escape(status.health)}</span> '
        f"<span>{escape(why)}</span></div></header>"
    )
    wrong = table(("wrong", "what"), ((s.reason, s.message) for s in status.degraded)) if status.degraded else ""
    return Html(shown + wrong)


def _cards(status: Status) -> Html:
    """The figures at the top."""
    tuned = status.tuned
    return facts(
        [
            ("folded", status.folds),
            ("waiting", status.queued),
            *([("in the pool", status.pool_size)] if status.select != "none" else []),
            ("record", status.head),
            *_form(status.form),
            ("rule", status.rule),
            ("scale", scale(status.scale, None if tuned is None else {"record": tuned.record, "folds": tuned.folds})),
            *((key, f"{value:.4g}") for key, value in status.gauges.items()),
            ("state", size(status.state_bytes)),
            ("disk free", "no disk" if status.disk_free_bytes is None else size(status.disk_free_bytes)),
            ("peak memory", size(status.peak_memory_bytes or 0)),
            ("up", Html(f'<span data-still="">{duration(status.uptime_seconds or 0)}</span>')),
        ]
    )


def _form(form: ShownForm) -> list[tuple[str, str]]:
    """The cards of a state of adapters."""
    if form.width is None:
        return [("keeps", form.kind)]
    if form.used is None:
        return [("keeps", form.kind), ("width", str(form.width))]
    return [
        ("keeps", form.kind),
        ("fullest layer", f"{form.used} of {form.width}"),
        ("cut off by now", share(form.cut)),
    ]


def footer(status: Status) -> Html:
    """What runs here, on what."""
    watched = [*status.watch, *(title_of(key) for key, report in status.sources.items() if report is not None)]
    return Html(
        f"continual {escape(status.version)}, process {status.pid}; "
        f"state {escape(status.state)} ({escape(status.state_id[:12])}); base {escape(status.base)}; "
        f"watching {escape(', '.join(watched)) or 'nothing'}. "
        '<a href="/api/status">status as JSON</a>, <a href="/api/log">ledger</a>, '
        '<a href="/metrics">metrics</a>, <a href="/api/openapi.json">all of the API</a>.'
    )


def under_way(current: UnderWay | None) -> Html:
    """What is done now, and how far it is."""
    hidden = " hidden" if current is None else ""
    told = current or UnderWay("", "", 0, 1)
    return Html(
        f'<p id="under-way"{hidden}>Now: <b data-part="model">{name(told.model)}</b>, '
        f'<span data-part="stage">{escape(told.stage)}</span> <progress aria-label="how far it is" '
        f'value="{told.done}" max="{max(told.total, 1)}"></progress> '
        f'<span data-part="count">{told.done}/{told.total}</span></p>'
    )


def _queue(status: Status) -> Html:
    if not status.queue:
        return paragraph("Nothing waits.", "none")
    more = status.queued - len(status.queue)
    told = ((name(r.model), r.failures or "", when(r.next_try) if r.next_try else "", r.error) for r in status.queue)
    return Html(table(("waiting", "failed", "next try", "what"), told) + _more(more))


def _source(key: str, report: SourceReport) -> Html:
    """What a source looks for, and whether it gets an answer."""
    asked = f"last asked {when(report.polled)}" if report.polled else "not asked yet"
    what = ", ".join(report.bases) or "pushes only"
    problem = paragraph(report.problem, "bad") if report.problem else ""
    told = paragraph(f"{what}: {asked}, {report.seen} commits open")
    return section(f"source-{key}", key.capitalize(), told, problem)


def _notes(notes: Sequence[str]) -> Html:
    """What the sources see that is no model."""
    return section("notes", "Seen and left", table(("what",), ((note,) for note in notes))) if notes else Html()


def _merge(status: Status) -> Html:
    """What each model of a state of adapters has in the merge, where an export that is out says it."""
    if status.form.width is None or not status.folds:
        return Html()
    found = next((one for one in status.shares if one.view is None), None)
    title = "What each model has"
    if found is None:
        return section(
            "merge",
            title,
            '<p class="none">No export of the merge is out that says it; <code>continual explain</code> finds it.</p>',
        )
    told = (
        f"<p>Of record {found.seq}, which {escape(found.place)} has. <i>share</i>: of the lengths of all task "
        "vectors; <i>cosine</i>: with the merge; <i>change</i>: of the merge when the model is left out. "
        "<code>continual explain</code> says it of the newest record, and by layer.</p>"
    )
    return section("merge", title, told, out.shares(found))


def _pool(status: Status) -> Html:
    """Who waits for a round, where rounds choose."""
    if status.select == "none":
        return Html()
    last = status.last_round
    told = "No round yet."
    if last is not None:
        told = (
            f"Last round {when(last.time)}, record {last.seq}: "
            f"loss {last.before:.4g} to {last.loss:.4g}, gap {last.gap:.3g}."
        )
    more = status.pool_size - len(status.pool)
    return section("pool", f"Pool ({status.select})", paragraph(told), _waiting(status.pool), _more(more))


def _waiting(waiting: Sequence[ShownWaiting]) -> Html:
    if not waiting:
        return paragraph("Nobody waits.", "none")
    return table(
        ("waiting", "since", "rounds", "score", "z", "why"),
        (
            (to_model(r.model_id, r.model), when(r.since), r.rounds, figure(r.score), figure(r.z), r.said)
            for r in waiting
        ),
    )


def _more(count: int) -> Html:
    return paragraph(f"and {count} more") if count > 0 else Html()
