"""What is out, on the front page: views, canaries, publications, and what each model has in it."""

from __future__ import annotations

from collections.abc import Sequence

from continual.service.web.pages.markup import Html, escape, name, paragraph, section, table
from continual.service.web.view import ShownCanary, ShownPublication, ShownShares, ShownView, Status
from continual.texts import share, when


def published(found: Sequence[ShownPublication]) -> Html:
    """Releases, and hooks that were called."""
    if not found:
        return Html()
    told = table(("record", "when", "what"), ((r.seq, when(r.time), r.message) for r in found))
    return section("published", "Published", told)


def canaries(found: Sequence[ShownCanary]) -> Html:
    """What is out as a canary, and what was seen of it."""
    if not found:
        return Html()
    told = table(
        ("canary", "record", "phase", "since", "in place of", "where", "seen"),
        (
            (
                r.view or "the merge",
                r.seq,
                r.phase,
                when(r.since) if r.since else "",
                "nothing" if r.back is None else r.back,
                ", ".join(r.places),
                _seen(r),
            )
            for r in found
        ),
    )
    return section("canaries", "Canaries", told)


def _seen(canary: ShownCanary) -> str:
    if not canary.measurements:
        return canary.said or "not measured yet"
    told = f"measured {canary.measurements} times; of the last {canary.kept}: {canary.failed} alarms"
    told += f", {canary.inconclusive} said nothing" if canary.inconclusive else ""
    return told + (f"; {canary.said}" if canary.said else "")


def views(status: Status) -> Html:
    """The views of the settings: what each reads, what of it is out, and what each model has in that."""
    if not status.views:
        return Html()
    known = {one.view: one for one in status.shares}
    return section("views", "Views", *(_view(view, known.get(view.name)) for view in status.views))


def _view(view: ShownView, found: ShownShares | None) -> Html:
    models = f"{view.count} {'model' if view.count == 1 else 'models'}: {view.models}" if view.count else "no model"
    by = f"{view.rule}, scale {view.scale}" if view.scale else view.rule
    problem = paragraph(view.problem, "bad") if view.problem else ""
    outs = "".join(f"<br>{escape(line)}" for line in _out(view)) or "<br>It is read by its name alone."
    told = f"<p>Reads {escape(models)}; by {escape(by)}. Goes out as {escape(view.form)}.{outs}</p>"
    return Html(f"<h3>{escape(view.name)}</h3>{problem}{told}{shares(found)}")


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


def shares(found: ShownShares | None) -> Html:
    """What each model has in what lies at a place."""
    if found is None or not found.models:
        return Html()
    of = f"in record {found.seq}" if found.view else "model"
    more = found.count - len(found.models)
    told = table(
        (of, "weight", "share", "cosine", "change"),
        ((name(r.model), f"{r.weight:g}", share(r.norm), f"{r.cosine:+.3f}", share(r.change)) for r in found.models),
    )
    return Html(told + (paragraph(f"and {more} more") if more > 0 else ""))
