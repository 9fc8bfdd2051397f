"""What a fold did, in figures: made from what its tensors gave, before anything is judged or committed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from continual.engine.folding import TensorFold, Terms
from continual.engine.outcomes import FoldReport, OpenCandidate
from continual.lazily import torch
from continual.outside import shown
from continual.records import Lineage, TokenRows
from continual.rules import Sums, figures_of, settle
from continual.state.parts import FoldNumbers, MatchedRows, MetNumbers, NoteSummary, SketchText
from continual.tensors.vectors.sketch import Sketch, SketchPlan

_LISTED = 100
"""Names of tensors that stay out that a record lists: a header can claim any number of them. So with tokens."""
_RUNS = 256
"""Runs of rows that a record lists; of a vocabulary in another order it has the digest alone."""


def report_of(
    opened: OpenCandidate,
    terms: Terms,
    folds: Mapping[str, TensorFold],
    squares: Mapping[str, float],
    digest: str,
    device: torch.device,
) -> FoldReport:
    """The report of a fold.

    Args:
        folds: what each tensor gave, by name.
        squares: ‖θ₀‖² of each tensor of the base that can be folded.
        digest: of the content of the candidate.
    """
    lineage, rule = opened.lineage, terms.rule
    ordered = [folds[name] for name in sorted(folds)]
    sums = Sums.total([fold.sums for fold in ordered])
    totals = settle(terms.totals, sums, terms.weight)
    figures = figures_of(sums)
    cross = math.sqrt(sums.tau_sq * terms.totals.merged_sq)
    pictures = {name: fold.picture for name, fold in folds.items() if fold.picture is not None}
    energies = {name: folds[name].sums.tau_sq for name in pictures}
    sketch = Sketch.of(terms.plan, energies, {name: each.projection for name, each in pictures.items()})
    out = [each.stands_out for _, each in sorted(pictures.items()) if each.stands_out is not None]
    numbers = replace(
        mapped(lineage, math.sqrt(sums.tau_sq)),
        base_norm=math.sqrt(math.fsum(squares[name] for name in lineage.folded)),
        merged_norm=math.sqrt(sums.merged_sq),
        cosine=sums.dot / cross if cross else None,
        weight=terms.weight if rule.laws.weighted else None,
        matrix_norm=None if figures is None else figures.matrix_norm_sum,
        plain_norm=None if figures is None else figures.plain_norm_sum,
        spread_norm=None if figures is None else figures.spread_sum,
        sketch=SketchText(sketch.norms, sketch.text),
        stands_out=median(out) if out else None,
        met=met(terms.plan, folds),
        notes=summarise([notes for fold in ordered for notes in fold.notes]),
        gauges=rule.read.gauges(totals),
    )
    return FoldReport(
        candidate=opened.candidate,
        digest=digest,
        lineage=lineage,
        totals=totals,
        numbers=numbers,
        seconds=seconds_of([fold.seconds for fold in ordered]),
        bytes_read=sum(fold.nbytes for fold in ordered),
        device=str(device),
        sketch=sketch,
        squares={name: fold.sums.tau_sq for name, fold in folds.items() if fold.sums.tau_sq},
        grids=tuple(each.grid for _, each in sorted(pictures.items()) if each.grid is not None),
        warnings=opened.warnings,
    )


def met(plan: SketchPlan, folds: Mapping[str, TensorFold]) -> MetNumbers | None:
    """How a task vector lies to the merge before it; None where there was none, or its lengths are not known."""
    changed = {name: fold for name, fold in folds.items() if fold.sums.tau_sq > 0.0}
    if not any(fold.before_sq for fold in changed.values()) or any(f.before_sq is None for f in changed.values()):
        return None
    tau, dots, before, gone = ([0.0] * plan.groups for _ in range(4))
    projected, sampled = False, []
    for name in sorted(changed):
        fold, group = changed[name], plan.group[name]
        tau[group] += fold.sums.tau_sq
        dots[group] += fold.sums.dot
        before[group] += fold.before_sq or 0.0
        if len(fold.notes) == 1 and "kept" in fold.notes[0]:
            projected = True
            gone[group] += (1.0 - fold.notes[0]["kept"]) * fold.sums.tau_sq
        if fold.picture is not None and fold.picture.meeting.overlap is not None:
            sampled.append((group, fold.picture.meeting))
    cosines = [d / math.sqrt(t * b) if t * b else 0.0 for d, t, b in zip(dots, tau, before, strict=True)]
    return MetNumbers(
        cosines=tuple(map(_rounded, cosines)),
        removed=tuple(_rounded(g / t if t else 0.0) for g, t in zip(gone, tau, strict=True)) if projected else None,
        sampled=tuple(group for group, _ in sampled) or None,
        overlap=tuple(_rounded(one.overlap or 0.0) for _, one in sampled) or None,
        conflict=tuple(_rounded(one.conflict or 0.0) for _, one in sampled) or None,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def matched(rows: TokenRows) -> MatchedRows:
    """How rows were matched by token, as a record keeps it."""
    return MatchedRows(
        tables=rows.tables,
        rows=sum(count for _, _, count in rows.runs),
        runs=rows.runs if len(rows.runs) <= _RUNS else None,
        digest=rows.digest,
        left_out=tuple(map(shown, rows.left_out[:_LISTED])),
        left_out_count=len(rows.left_out),
        lacking=tuple(map(shown, rows.lacking[:_LISTED])),
        lacking_count=len(rows.lacking),
    )


def mapped(lineage: Lineage, tau_norm: float) -> FoldNumbers:
    """The figures of a fold that say how the candidate maps to the base, and the norm of its task vector."""
    return FoldNumbers(
        tau_norm=tau_norm,
        tensors=len(lineage.folded),
        unchanged=len(lineage.unchanged),
        extra=lineage.extra[:_LISTED],
        extra_count=len(lineage.extra),
        prefix=lineage.prefix,
        narrowed=lineage.narrowed,
        rows=lineage.rows,
        renamings=(*lineage.repackings, *lineage.renamings)[:_LISTED] or None,
        tokens=tuple(map(matched, lineage.tokens)) or None,
    )


def summarise(notes: Sequence[Mapping[str, float]]) -> dict[str, NoteSummary]:
    """Smallest, mean and largest of each note over the tensors that have it."""
    columns: dict[str, list[float]] = {}
    for row in notes:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {key: NoteSummary(min(v), math.fsum(v) / len(v), max(v), len(v)) for key, v in sorted(columns.items())}


def seconds_of(tensors: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Wall time by stage, added over the tensors."""
    stages: dict[str, float] = {}
    for seconds in tensors:
        for stage, value in seconds.items():
            stages[stage] = stages.get(stage, 0.0) + value
    return stages
