"""Tables of folds and of refusals, on the front page and on the pages of their own."""

from __future__ import annotations

from collections.abc import Sequence

from continual.service.web.pages.markup import Html, paragraph, table, to_fold, to_model
from continual.service.web.recalled import RecalledFold
from continual.service.web.view import ShownFold, ShownRefusal
from continual.texts import figure, share, when


def folds(found: Sequence[ShownFold]) -> Html:
    """The newest folds in force."""
    if not found:
        return paragraph("No fold yet.", "none")
    outs = any(r.left_out for r in found)
    warned = any(r.warned for r in found)
    cosines = any(r.cosine is not None for r in found)
    cuts = any(r.cut is not None for r in found)
    return table(
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
                to_fold(r.seq),
                when(r.time),
                to_model(r.model_id, r.model),
                r.form,
                figure(r.tau_norm, ".4g"),
                *((figure(r.cosine or None, "+.3f"),) if cosines else ()),
                figure(r.weight, ".3g"),
                *((share(r.cut), share(r.cut_now)) if cuts else ()),
                *((r.left_out,) if outs else ()),
                *((r.warned,) if warned else ()),
            )
            for r in found
        ),
    )


def timeline(found: Sequence[RecalledFold]) -> Html:
    """Folds of the past, with what became of each."""
    if not found:
        return paragraph("No such fold.", "none")
    cosines = any(r.shown.cosine is not None for r in found)
    kept = any(r.kept is not None for r in found)
    conflicts = any(r.conflict is not None for r in found)
    warned = any(r.shown.warned for r in found)
    return table(
        (
            "record",
            "when",
            "model",
            "fate",
            "norm",
            *(("cosine",) if cosines else ()),
            *(("interference",) if conflicts else ()),
            *(("kept",) if kept else ()),
            "merge norm",
            "weight",
            *(("warned",) if warned else ()),
        ),
        (
            (
                to_fold(r.shown.seq, r.part),
                when(r.shown.time),
                to_model(r.shown.model_id, r.shown.model),
                r.fate,
                figure(r.shown.tau_norm, ".4g"),
                *((figure(r.shown.cosine or None, "+.3f"),) if cosines else ()),
                *((share(r.conflict),) if conflicts else ()),
                *((share(r.kept),) if kept else ()),
                figure(r.merged_norm, ".4g"),
                figure(r.shown.weight, ".3g"),
                *((r.shown.warned,) if warned else ()),
            )
            for r in found
        ),
    )


def refusals(found: Sequence[ShownRefusal]) -> Html:
    """What was refused, and why."""
    if not found:
        return paragraph("None.", "none")
    now = any(r.now for r in found)
    return table(
        ("record", "when", "model", *(("now",) if now else ()), "reason", "why"),
        (
            (r.seq, when(r.time), to_model(r.model_id, r.model), *((r.now,) if now else ()), r.reason, r.message)
            for r in found
        ),
    )
