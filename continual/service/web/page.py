"""The status page: one document, no script, every value escaped. It reloads itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from continual.service.web.view import (
    ShownCanary,
    ShownFold,
    ShownForm,
    ShownPublication,
    ShownRefusal,
    ShownShares,
    ShownView,
    ShownWaiting,
    Status,
    UnderWay,
)
from continual.sources.contract import SourceReport
from continual.sources.roster import title_of
from continual.texts import duration, figure, plain, scale, share, size, when

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--good:#3fb950;--bad:#ff7b72}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1.2rem}
h1{font-size:1.4rem;margin:0}
h2{font-size:1.05rem;margin:1.8rem 0 .5rem}
h3{font-size:.95rem;margin:1rem 0 .2rem}
header{display:flex;gap:.8rem;align-items:baseline;flex-wrap:wrap}
.tag{border-radius:1rem;padding:.05rem .7rem;font-weight:600;border:1px solid currentColor}
.good{color:var(--good)}
.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0 0;padding:0}
.cards div{background:var(--soft);border-radius:.5rem;padding:.5rem .8rem}
.cards dt{opacity:.7;font-size:.85rem}
.cards dd{margin:0;font-size:1.15rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;opacity:.75;white-space:nowrap}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
td.wide{min-width:18rem;overflow-wrap:anywhere}
p.none{opacity:.65;margin:.2rem 0}
footer{margin-top:2rem;opacity:.65;font-size:.85rem;overflow-wrap:anywhere}
progress{width:10rem;vertical-align:middle}
meter{width:5rem;margin-left:.6rem;vertical-align:middle}
@media(max-width:40rem){meter{display:none}}
"""
SECONDS = 5
"""Seconds after which the page reloads itself."""
_WIDE = ("why", "what", "left out")
_NUMBERS = (
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
    "cut at fold",
    "cut by now",
    "share",
    "change",
)
_BARS = ("share", "change")
"""Columns of percentages that are also drawn."""


def escape(text: str) -> str:
    """A text from outside as HTML; control characters and bytes that are no UTF-8 as escapes that can be seen."""
    return html.escape(plain(text))


def render(status: Status) -> str:
    """The page for `status`."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="refresh" content="{SECONDS}">'
        f"<title>continual: {status.folds} folded</title><style>{_STYLE}</style>"
    )
    body = [
        _header(status),
        _cards(status),
        "<h2>Queue</h2>",
        _current(status.current),
        _queue(status),
        *(_source(name, report) for name, report in status.sources.items() if report is not None),
        _notes(status.notes),
        _pool(status),
        "<h2>Last folds</h2>",
        _folds(status.last_folds),
        _merge(status),
        _views(status),
        _canaries(status.canaries),
        _published(status.published),
        "<h2>Refusals</h2>",
        _refusals(status.refusals),
        _footer(status),
    ]
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


def _header(status: Status) -> str:
    tag = "good" if status.health == "ok" else "bad"
    why = "" if status.degraded else status.why
    shown = (
        f'<header><h1>continual</h1><span class="tag {tag}">{escape(status.health)}</span>'
        f"<span>{escape(why)}</span></header>"
    )
    return shown + (
        _table(("wrong", "what"), ((s.reason, s.message) for s in status.degraded)) if status.degraded else ""
    )


def _cards(status: Status) -> str:
    """The figures at the top."""
    tuned = status.tuned
    cards = [
        ("folded", status.folds),
        ("waiting", status.queued),
        *([("in the pool", status.pool_size)] if status.select != "none" else []),
        ("record", status.head),
        *_form(status.form),
        ("rule", status.rule),
        ("scale", scale(status.scale, None if tuned is None else {"record": tuned.record, "folds": tuned.folds})),
        *((name, f"{value:.4g}") for name, value in status.gauges.items()),
        ("state", size(status.state_bytes)),
        ("disk free", size(status.disk_free_bytes)),
        ("peak memory", size(status.peak_memory_bytes or 0)),
        ("up", duration(status.uptime_seconds or 0)),
    ]
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in cards)
    return f'<dl class="cards">{shown}</dl>'


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


def _footer(status: Status) -> str:
    watched = [*status.watch, *(title_of(name) for name, report in status.sources.items() if report is not None)]
    return (
        f"<footer>continual {escape(status.version)}, process {status.pid}; "
        f"state {escape(status.state)} ({escape(status.state_id[:12])}); base {escape(status.base)}; "
        f"watching {escape(', '.join(watched)) or 'nothing'}. "
        '<a href="/api/status">status as JSON</a>, <a href="/api/log">ledger</a>, '
        '<a href="/metrics">metrics</a></footer>'
    )


def _current(current: UnderWay | None) -> str:
    if current is None:
        return ""
    return (
        f"<p>Folding <b>{escape(current.model)}</b>: {escape(current.stage)} "
        f'<progress value="{current.done}" max="{max(current.total, 1)}"></progress> {current.done}/{current.total}</p>'
    )


def _queue(status: Status) -> str:
    if not status.queue:
        return '<p class="none">Nothing waits.</p>'
    more = status.queued - len(status.queue)
    rows = ((r.model, r.failures or "", when(r.next_try) if r.next_try else "", r.error or "") for r in status.queue)
    table = _table(("waiting", "failed", "next try", "what"), rows)
    return table + (f"<p>and {more} more</p>" if more > 0 else "")


def _source(name: str, report: SourceReport) -> str:
    """What a source looks for, and whether it gets an answer."""
    asked = f"last asked {when(report.polled)}" if report.polled else "not asked yet"
    what = ", ".join(report.bases) or "pushes only"
    problem = f'<p class="bad">{escape(report.problem)}</p>' if report.problem else ""
    told = f"<p>{escape(what)}: {escape(asked)}, {report.seen} commits open</p>"
    return f"<h2>{escape(name.capitalize())}</h2>{told}{problem}"


def _notes(notes: Sequence[str]) -> str:
    """What the sources see that is no model."""
    return f"<h2>Seen and left</h2>{_table(('what',), ((note,) for note in notes))}" if notes else ""


def _published(rows: Sequence[ShownPublication]) -> str:
    if not rows:
        return ""
    table = _table(("record", "when", "what"), ((r.seq, when(r.time), r.message) for r in rows))
    return f"<h2>Published</h2>{table}"


def _canaries(rows: Sequence[ShownCanary]) -> str:
    """What is out as a canary, and what was seen of it."""
    if not rows:
        return ""
    table = _table(
        ("canary", "record", "phase", "since", "in place of", "where", "measured", "alarms", "nothing said", "what"),
        (
            (
                r.view or "the merge",
                r.seq,
                r.phase,
                when(r.since) if r.since else "",
                "" if r.back is None else r.back,
                ", ".join(r.places),
                r.measurements,
                f"{r.failed} of {r.kept}",
                f"{r.inconclusive} of {r.kept}",
                r.said,
            )
            for r in rows
        ),
    )
    return f"<h2>Canaries</h2>{table}"


def _views(status: Status) -> str:
    """The views of the settings: what each reads, what of it is out, and what each model has in that."""
    if not status.views:
        return ""
    shares = {one.view: one for one in status.shares}
    return "<h2>Views</h2>" + "".join(_view(view, shares.get(view.name)) for view in status.views)


def _view(view: ShownView, shares: ShownShares | None) -> str:
    models = f"{view.count} {'model' if view.count == 1 else 'models'}: {view.models}" if view.count else "no model"
    by = f"{view.rule}, scale {view.scale}" if view.scale else view.rule
    problem = f'<p class="bad">{escape(view.problem)}</p>' if view.problem else ""
    outs = "".join(f"<br>{escape(line)}" for line in _out(view)) or "<br>It is read by its name alone."
    told = f"<p>Reads {escape(models)}; by {escape(by)}. Goes out as {escape(view.form)}.{outs}</p>"
    return f"<h3>{escape(view.name)}</h3>{problem}{told}{_shares(shares)}"


def _out(view: ShownView) -> list[str]:
    """What is out of a view, a line for each place."""
    found = []
    if view.current is not None:
        since = f", {when(view.current_time)}" if view.current_time else ""
        out = "nothing yet" if view.current_seq is None else f"record {view.current_seq}{since}"
        found.append(f"{view.current}: {out}")
    if view.repo is not None:
        out = "nothing yet" if view.released_seq is None else f"record {view.released_seq}"
        found.append(f"{view.repo}: {out}")
    return found


def _merge(status: Status) -> str:
    """What each model of a state of adapters has in the merge, where an export that is out says it."""
    if status.form.width is None or not status.folds:
        return ""
    found = next((one for one in status.shares if one.view is None), None)
    if found is None:
        told = (
            '<p class="none">No export of the merge is out that says it; <code>continual explain</code> finds it.</p>'
        )
    else:
        told = (
            f"<p>Of record {found.seq}, which {escape(found.place)} has. <i>share</i>: of the lengths of all task "
            "vectors; <i>cosine</i>: with the merge; <i>change</i>: of the merge when the model is left out. "
            f"<code>continual explain</code> says it of the newest record, and by layer.</p>{_shares(found)}"
        )
    return f"<h2>What each model has</h2>{told}"


def _shares(found: ShownShares | None) -> str:
    if found is None or not found.models:
        return ""
    of = f"in record {found.seq}" if found.view else "model"
    more = found.count - len(found.models)
    table = _table(
        (of, "weight", "share", "cosine", "change"),
        ((r.model, f"{r.weight:g}", share(r.norm), f"{r.cosine:+.3f}", share(r.change)) for r in found.models),
    )
    return table + (f"<p>and {more} more</p>" if more > 0 else "")


def _pool(status: Status) -> str:
    """Who waits for a round, where rounds choose."""
    if status.select == "none":
        return ""
    last = status.last_round
    told = "No round yet."
    if last is not None:
        told = (
            f"Last round {when(last.time)}, record {last.seq}: "
            f"loss {last.before:.4g} to {last.loss:.4g}, gap {last.gap:.3g}."
        )
    more = status.pool_size - len(status.pool)
    return f"<h2>Pool ({escape(status.select)})</h2><p>{escape(told)}</p>{_waiting(status.pool)}" + (
        f"<p>and {more} more</p>" if more > 0 else ""
    )


def _waiting(rows: Sequence[ShownWaiting]) -> str:
    if not rows:
        return '<p class="none">Nobody waits.</p>'
    return _table(
        ("waiting", "since", "rounds", "score", "z", "why"),
        ((r.model, when(r.since), r.rounds, figure(r.score), figure(r.z), r.said) for r in rows),
    )


def _folds(rows: Sequence[ShownFold]) -> str:
    if not rows:
        return '<p class="none">No fold yet.</p>'
    outs = any(r.left_out for r in rows)
    warned = any(r.warned for r in rows)
    cosines = any(r.cosine is not None for r in rows)
    cuts = any(r.cut is not None for r in rows)
    return _table(
        (
            "record",
            "when",
            "model",
            "form",
            "norm",
            *(("cosine",) if cosines else ()),
            "weight",
            *(("cut at fold", "cut by now") if cuts else ()),
            *(("left out",) if outs else ()),
            *(("warned",) if warned else ()),
        ),
        (
            (
                r.seq,
                when(r.time),
                r.model,
                r.form,
                figure(r.tau_norm, ".4g"),
                *((figure(r.cosine, "+.3f"),) if cosines else ()),
                figure(r.weight, ".3g"),
                *((share(r.cut), share(r.cut_now)) if cuts else ()),
                *((r.left_out,) if outs else ()),
                *((r.warned,) if warned else ()),
            )
            for r in rows
        ),
    )


def _refusals(rows: Sequence[ShownRefusal]) -> str:
    if not rows:
        return '<p class="none">None.</p>'
    return _table(
        ("record", "when", "model", "reason", "why"),
        ((r.seq, when(r.time), r.model, r.reason, r.message) for r in rows),
    )


def _bar(percent: str) -> str:
    """A percentage as a bar, at most full."""
    return f'<meter max="100" value="{percent.removesuffix(" %") or 0}"></meter>'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(name: str, value: object) -> str:
        kind = ""
        if name in _WIDE:
            kind = ' class="wide"'
        elif name in _NUMBERS:
            kind = ' class="n"'
        text = escape(str(value))
        return f"<td{kind}>{text}{_bar(text) if name in _BARS else ''}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(map(cell, head, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'
