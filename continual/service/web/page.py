"""The status page: one document, no script, every value escaped. It reloads itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from continual.service.web.view import Status
from continual.texts import duration, figure, scale, size, when

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--good:#3fb950;--bad:#ff7b72}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1.2rem}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:1.8rem 0 .5rem}header{display:flex;gap:.8rem;align-items:baseline;flex-wrap:wrap}
.tag{border-radius:1rem;padding:.05rem .7rem;font-weight:600;border:1px solid currentColor}.good{color:var(--good)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0 0;padding:0}
.cards div{background:var(--soft);border-radius:.5rem;padding:.5rem .8rem}.cards dt{opacity:.7;font-size:.85rem}.cards dd{margin:0;font-size:1.15rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;opacity:.75;white-space:nowrap}td.n{font-variant-numeric:tabular-nums;white-space:nowrap}td.wide{min-width:18rem;overflow-wrap:anywhere}
p.none{opacity:.65;margin:.2rem 0}footer{margin-top:2rem;opacity:.65;font-size:.85rem;overflow-wrap:anywhere}progress{width:10rem;vertical-align:middle}
"""
SECONDS = 5


def render(status: Status) -> str:
    """The page for `status`."""
    good = status.health == "ok"
    cards = [
        ("folded", status.folds),
        ("waiting", status.queued),
        *([("in the pool", status.pool_size)] if status.select != "none" else []),
        ("record", status.head),
        ("rule", status.rule),
        ("scale", scale(status.scale, status.tuned)),
        *((name, f"{value:.4g}") for name, value in status.gauges.items()),
        ("state", size(status.state_bytes)),
        ("disk free", size(status.disk_free_bytes)),
        ("peak memory", size(status.peak_memory_bytes or 0)),
        ("up", duration(status.uptime_seconds or 0)),
    ]
    body = [
        f'<header><h1>continual</h1><span class="tag {"good" if good else "bad"}">{escape(status.health)}</span><span>{escape(status.why)}</span></header>',
        '<dl class="cards">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in cards)
        + "</dl>",
        "<h2>Queue</h2>",
        _current(status.current),
        _table(("waiting",), ((name,) for name in status.queue))
        if status.queue
        else '<p class="none">Nothing waits.</p>',
        f"<p>and {status.queued - len(status.queue)} more</p>" if status.queued > len(status.queue) else "",
        _hub(status),
        _pool(status),
        "<h2>Last folds</h2>",
        _folds(status.last_folds),
        _published(status.published),
        "<h2>Refusals</h2>",
        _refusals(status.refusals),
        f"<footer>continual {escape(status.version)}, process {status.pid}; state {escape(status.state)} ({escape(status.state_id[:12])}); base {escape(status.base)}; "
        f"watching {escape(', '.join([*status.watch, *(['the Hub'] if status.hub else [])])) or 'nothing'}. "
        '<a href="/api/status">status as JSON</a>, <a href="/api/log">ledger</a>, <a href="/metrics">metrics</a></footer>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><meta http-equiv="refresh" content="{SECONDS}">'
    return f'<!doctype html><html lang="en"><head>{head}<title>continual: {status.folds} folded</title><style>{_STYLE}</style></head><body>{"".join(body)}</body></html>'


def _current(current: Mapping[str, Any] | None) -> str:
    if current is None:
        return ""
    done, total = int(current["done"]), int(current["total"])
    return f'<p>Folding <b>{escape(str(current["model"]))}</b>: {escape(str(current["stage"]))} <progress value="{done}" max="{max(total, 1)}"></progress> {done}/{total}</p>'


def _hub(status: Status) -> str:
    """What is taken from the Hub, and whether it answers."""
    if status.hub is None:
        return ""
    asked = f"last asked {when(status.hub['polled'])}" if status.hub["polled"] else "not asked yet"
    what = ", ".join(status.hub["bases"]) or "pushes only"
    problem = f'<p class="bad">{escape(status.hub["problem"])}</p>' if status.hub["problem"] else ""
    return f"<h2>Hub</h2><p>{escape(what)}: {escape(asked)}, {status.hub['seen']} commits open</p>{problem}"


def _published(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    return "<h2>Published</h2>" + _table(
        ("record", "when", "what"), ((r["seq"], when(r["time"]), r["message"]) for r in rows)
    )


def _pool(status: Status) -> str:
    """Who waits for a round, where rounds choose."""
    if status.select == "none":
        return ""
    last = status.last_round
    told = (
        f"Last round {when(last['time'])}, record {last['seq']}: loss {last['before']:.4g} to {last['loss']:.4g}, gap {last['gap']:.3g}."
        if last
        else "No round yet."
    )
    head = ("waiting", "since", "rounds", "score", "z", "why")
    rows = (
        (r["model"], when(r["since"]), r["rounds"], figure(r["score"]), figure(r["z"]), r["said"]) for r in status.pool
    )
    table = _table(head, rows) if status.pool else '<p class="none">Nobody waits.</p>'
    more = f"<p>and {status.pool_size - len(status.pool)} more</p>" if status.pool_size > len(status.pool) else ""
    return f"<h2>Pool ({escape(status.select)})</h2><p>{escape(told)}</p>{table}{more}"


def _folds(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="none">No fold yet.</p>'
    head = ("record", "when", "model", "form", "norm", "cosine", "weight")
    return _table(
        head,
        (
            (
                r["seq"],
                when(r["time"]),
                r["model"],
                r["form"],
                figure(r["tau_norm"], ".4g"),
                figure(r["cosine"], "+.3f"),
                figure(r["weight"], ".3g"),
            )
            for r in rows
        ),
    )


def _refusals(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="none">None.</p>'
    return _table(
        ("record", "when", "model", "reason", "why"),
        ((r["seq"], when(r["time"]), r["model"], r["reason"], r["message"]) for r in rows),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(name: str, value: object) -> str:
        kind = (
            ' class="wide"'
            if name in ("why", "what")
            else ' class="n"'
            if name in ("record", "when", "since", "norm", "cosine", "score", "z", "weight")
            else ""
        )
        return f"<td{kind}>{escape(str(value))}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(map(cell, head, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'
