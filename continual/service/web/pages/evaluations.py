"""The page of evaluations: what the merge was worth at each fold."""

from __future__ import annotations

from collections.abc import Sequence

from continual.service.web.pages import pictures
from continual.service.web.pages.markup import Html, name, paragraph, section, table, to_fold
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.recalled import RecalledEvaluation
from continual.texts import when


def render(found: Sequence[RecalledEvaluation], around: Around) -> str:
    """The page; `found` has the oldest first."""
    told = (
        [section("lines", "Over the folds", pictures.metrics(found)), section("table", "Each fold", _table(found))]
        if found
        else [
            paragraph(
                "None of the newest folds was evaluated. The settings [evaluation] have the merge measured before "
                "each fold is committed.",
                "none",
            )
        ]
    )
    return document(Frame("/evaluations", "Evaluations, continual", around), "<h1>Evaluations</h1>", *told)


def _table(found: Sequence[RecalledEvaluation]) -> Html:
    names = list(dict.fromkeys(key for one in found for key in one.after))[: pictures.LINES]
    return table(
        ("record", "when", "model", *names, "verdict"),
        (
            (
                to_fold(one.seq),
                when(one.time),
                name(one.model),
                *(_figure(one, key) for key in names),
                one.verdict or "not judged",
            )
            for one in reversed(found)
        ),
    )


def _figure(one: RecalledEvaluation, key: str) -> str:
    """A metric, and how it differs from what it was without the model."""
    if key not in one.after:
        return ""
    told = f"{one.after[key]:.4g}"
    return told + (f" ({one.after[key] - one.before[key]:+.3g})" if key in one.before else "")


def one(found: RecalledEvaluation) -> Html:
    """The metrics of one fold."""
    rows = (
        (
            key,
            f"{value:.4g}",
            f"{found.before[key]:.4g}" if key in found.before else "",
            f"± {found.errors[key]:.2g}" if key in found.errors else "",
            f"{found.of_base[key]:.4g}" if key in found.of_base else "",
        )
        for key, value in found.after.items()
    )
    on = f", on {found.rows} rows" if found.rows else ""
    told = paragraph(f"Verdict: {found.verdict or 'not judged'}{on}.")
    return Html(told + table(("metric", "with it", "without it", "difference's error", "base"), rows))
