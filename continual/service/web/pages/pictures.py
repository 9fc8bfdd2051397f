"""Pictures as SVG, drawn with classes of the stylesheet alone: what each fold changed by groups of layers, how long the
task vectors were, how metrics went. Each has a sentence for who does not see it, and a bounded number of shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from continual.service.web.pages.markup import Html, escape
from continual.service.web.recalled import LayerPicture, RecalledEvaluation, RecalledFold

ROWS = 24
"""Rows of the picture of layers at most: neighbours share one."""
COLUMNS = 40
"""Folds of the picture of layers at most."""
LEVELS = 8
"""Shades, of which 0 is nothing."""
LINES = 6
"""Metrics of an evaluation that are drawn."""
_CELL, _HIGH, _LABEL = 14, 12, 210
_LETTERS = 34


def layers(picture: LayerPicture, *, columns: int = COLUMNS) -> Html:
    """A heat map: a column for each fold, the newest on the right, a row for each group of layers, the first on top.
    The darker, the longer the fold's task vector is there; shades go by the root of the length, beside the longest of
    the picture."""
    shown = picture.columns[-columns:]
    if not shown:
        return Html()
    names, lengths = _rows(picture.groups, [column.norms for column in shown])
    most = max((value for column in lengths for value in column), default=0.0) or 1.0
    body = []
    for row, called in enumerate(names):
        y = _HIGH * row
        body.append(f'<text x="{_LABEL - 6}" y="{y + 10}" class="end">{escape(_short(called))}</text>')
        for number, column in enumerate(lengths):
            level = _level(column[row], most)
            body.append(f'<rect x="{_LABEL + _CELL * number}" y="{y}" width="13" height="11" class="h{level}"/>')
    high, wide = _HIGH * len(names), _LABEL + _CELL * len(shown)
    step = max(1, math.ceil(len(shown) / 8))
    for number in range(0, len(shown), step):
        body.append(f'<text x="{_LABEL + _CELL * number}" y="{high + 13}">{shown[number].seq}</text>')
    at, row = max(
        ((number, row) for number in range(len(lengths)) for row in range(len(names))),
        key=lambda place: lengths[place[0]][place[1]],
    )
    said = (
        f"What each of {len(shown)} folds changed, by layers: most in {names[row]}, by record {shown[at].seq} "
        f"({escape_name(shown[at].model)})."
    )
    return Html(_svg(max(wide, _LABEL + 200), high + 18, said, body) + _legend(most))


def lengths(folds: Sequence[RecalledFold]) -> Html:
    """Bars: the length of each fold's task vector, the oldest on the left; those that are not in the merge any more are
    drawn empty."""
    rows = [fold for fold in reversed(folds) if fold.shown.tau_norm is not None]
    if len(rows) < 2:
        return Html()
    most = max(fold.shown.tau_norm or 0.0 for fold in rows) or 1.0
    body = []
    for number, fold in enumerate(rows):
        high = max(1.0, 60 * (fold.shown.tau_norm or 0.0) / most)
        kind = "bar" if fold.in_force else "bar gone"
        body.append(f'<rect x="{10 * number}" y="{62 - high:.1f}" width="8" height="{high:.1f}" class="{kind}"/>')
    said = f"Lengths of the task vectors of {len(rows)} folds, the oldest on the left; the longest is {most:.4g}."
    return _svg(max(10 * len(rows), 200), 64, said, body)


def metrics(found: Sequence[RecalledEvaluation]) -> Html:
    """Lines: each metric of the merge over the evaluated folds, each over its own range."""
    names = list(dict.fromkeys(key for one in found for key in one.after))[:LINES]
    drawn = [_line(called, [one.after for one in found]) for called in names]
    return Html("".join(drawn))


def _line(called: str, after: Sequence[Mapping[str, float]]) -> str:
    points = [(number, one[called]) for number, one in enumerate(after) if math.isfinite(one.get(called, math.nan))]
    if len(points) < 2:
        return ""
    least, most = min(value for _, value in points), max(value for _, value in points)
    span, wide = (most - least) or 1.0, 600
    places = " ".join(
        f"{wide * number / max(1, len(after) - 1):.1f},{62 - 56 * (value - least) / span:.1f}"
        for number, value in points
    )
    said = f"{called} over {len(points)} evaluated folds: from {points[0][1]:.4g} to {points[-1][1]:.4g}, "
    said += f"between {least:.4g} and {most:.4g}."
    drawn = _svg(wide, 68, said, [f'<polyline points="{places}" class="line"/>'])
    return f"<figure>{drawn}<figcaption>{escape(said)}</figcaption></figure>"


def escape_name(called: str | None) -> str:
    """A name as it stands in a sentence: short."""
    return _short(called or "")


def _rows(names: Sequence[str], columns: Sequence[Sequence[float]]) -> tuple[list[str], list[list[float]]]:
    """At most `ROWS` rows: the lengths of neighbours that share one are of both together."""
    count = min(ROWS, len(names))
    starts = [len(names) * row // count for row in range(count + 1)]
    spans = [range(first, last) for first, last in pairwise(starts)]
    called = [names[span[0]] + (f" to {names[span[-1]]}" if len(span) > 1 else "") for span in spans]
    return called, [[math.sqrt(math.fsum(column[n] ** 2 for n in span)) for span in spans] for column in columns]


def _level(value: float, most: float) -> int:
    if not math.isfinite(value) or value <= 0:
        return 0
    return max(1, min(LEVELS, round(LEVELS * math.sqrt(value / most))))


def _legend(most: float) -> Html:
    shades = "".join(f'<rect x="{16 * n}" y="0" width="15" height="11" class="h{n}"/>' for n in range(LEVELS + 1))
    return Html(
        f'<p class="legend"><svg aria-hidden="true" width="{16 * (LEVELS + 1)}" height="11">{shades}</svg> '
        f"from 0 to {most:.3g}: the length of the task vector in these layers; shades go by its root</p>"
    )


def _svg(wide: float, high: float, said: str, body: Sequence[str]) -> Html:
    """A picture in a box that can be scrolled, by keys, too, where the screen is narrow."""
    return Html(
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(said)}">'
        f'<svg role="img" aria-label="{escape(said)}" width="{wide:.0f}" height="{high:.0f}" '
        f'viewBox="0 0 {wide:.0f} {high:.0f}">{"".join(body)}</svg></div>'
    )


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
