"""A picture of what tells two merges apart: a heat map of layers and the kinds of matrices in them, as SVG. Names come
from strangers, and are escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from continual.engine.comparing import Diff, DiffTensor
from continual.errors import Misconfigured
from continual.outside import shown
from continual.state.durable import replace_bytes, usable

_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)")
_WIDTH, _HEIGHT, _GAP = 34, 16, 2
_LETTER = 6.2
"""Pixels of a letter, about."""
_LEAST, _MOST = (238, 243, 250), (8, 48, 107)


class _Cell(NamedTuple):
    """The sums of squares of the difference and of the task vector before, over the tensors of one cell."""

    change: float
    before: float
    tensors: int


def check_picture(file: Path) -> None:
    """Raises Misconfigured for a file that no picture can be written to."""
    if file.suffix != ".svg":
        raise Misconfigured(f"picture = {file}: the picture is SVG, so name a file that ends in .svg")
    with usable(f"cannot write {file}"):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise Misconfigured(f"picture = {file}: name a file in a directory that is there")


def draw(found: Diff, file: Path) -> None:
    """Writes the picture, in place of what was there. Raises Misconfigured and Retry where that cannot be done."""
    with usable(f"cannot write {file}"):
        replace_bytes(file, heat_map(found).encode("utf-8", "backslashreplace"))


def heat_map(found: Diff) -> str:
    """The document: a row for each layer, from the first down to the last, a column for each kind of tensor in it; the
    darker, the longer the difference is over the length of the merged task vector before. Tensors in no layer have a
    column of their own kind. Where nothing was merged before, it is the length of the difference."""
    cells = _cells(found.tensors)
    rows = list(dict.fromkeys(layer for layer, _ in cells))
    columns = list(dict.fromkeys(part for _, part in cells))
    relative = any(cell.before for cell in cells.values())
    values = {place: _value(cell, relative=relative) for place, cell in cells.items()}
    largest = max((value for value in values.values() if value is not None), default=0.0)
    left = 16 + _LETTER * max((len(_label(row)) for row in rows), default=0)
    top = 64 + _LETTER * 0.87 * max((len(_label(column)) for column in columns), default=0)
    wide = max(left + _WIDTH * len(columns) + 110, 520)
    high = top + _HEIGHT * len(rows) + 70
    said = "difference over the task vector before" if relative else "length of the difference"
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{wide:.0f}" height="{high:.0f}" fill="#fff"/>',
        f'<text x="16" y="24" font-size="14">{_text(f"{found.a} to {found.b}")}</text>',
        f'<text x="16" y="42">{_text(_whole(found))}</text>',
    ]
    for number, column in enumerate(columns):
        x = left + _WIDTH * (number + 0.5)
        body.append(
            f'<text x="{x:.1f}" y="{top - 6:.1f}" transform="rotate(-60 {x:.1f} {top - 6:.1f})">{_text(column)}</text>'
        )
    for line, row in enumerate(rows):
        y = top + _HEIGHT * line
        body.append(f'<text x="{left - 8:.1f}" y="{y + 12:.1f}" text-anchor="end">{_text(row)}</text>')
        for number, column in enumerate(columns):
            if (row, column) in cells:
                at = (left + _WIDTH * number, y)
                body.append(_drawn(at, f"{row} {column}".strip(), cells[row, column], values[row, column], largest))
    body += _legend(16, top + _HEIGHT * len(rows) + 24, largest, said, percent=relative)
    if None in values.values():
        body.append(
            f'<text x="228" y="{top + _HEIGHT * len(rows) + 48:.0f}">orange: nothing was merged here before</text>'
        )
    return "\n".join([*body, "</svg>", ""])


def _cells(tensors: Sequence[DiffTensor]) -> dict[tuple[str, str], _Cell]:
    """By layer and kind; the experts of a layer are one cell, and so are weight and bias of one module apart."""
    found: dict[tuple[str, str], _Cell] = {}
    for one in tensors:
        place = (one.layer, _EXPERT.sub("", one.part))
        old = found.get(place, _Cell(0.0, 0.0, 0))
        figures = one.figures
        found[place] = _Cell(old.change + figures.change**2, old.before + figures.before**2, old.tensors + 1)
    return found


def _value(cell: _Cell, *, relative: bool) -> float | None:
    if not relative:
        return math.sqrt(cell.change)
    return math.sqrt(cell.change / cell.before) if cell.before else None if cell.change else 0.0


def _drawn(at: tuple[float, float], name: str, cell: _Cell, value: float | None, largest: float) -> str:
    x, y = at
    fill = "#d94801" if value is None else _colour(value / largest if largest else 0.0)
    told = f"{name}: difference {math.sqrt(cell.change):.4g}, before {math.sqrt(cell.before):.4g}"
    told += "; nothing was merged here before" if value is None else ""
    told += f"; {cell.tensors} tensors" if cell.tensors > 1 else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_WIDTH - _GAP}" height="{_HEIGHT - _GAP}" fill="{fill}">'
        f"<title>{_text(told)}</title></rect>"
    )


def _legend(x: float, y: float, largest: float, said: str, *, percent: bool) -> list[str]:
    steps = 40
    body = [
        f'<rect x="{x + 5 * step:.0f}" y="{y:.0f}" width="5" height="10" fill="{_colour(step / (steps - 1))}"/>'
        for step in range(steps)
    ]
    most = f"{100 * largest:.3g} %" if percent else f"{largest:.3g}"
    return [
        *body,
        f'<text x="{x:.0f}" y="{y + 24:.0f}">0</text>',
        f'<text x="{x + 5 * steps:.0f}" y="{y + 24:.0f}" text-anchor="end">{most}</text>',
        f'<text x="{x + 5 * steps + 12:.0f}" y="{y + 10:.0f}">{said}</text>',
    ]


def _whole(found: Diff) -> str:
    told: Mapping[str, float | None] = {
        "difference": found.whole.change,
        "relative": found.whole.relative,
        "cosine": found.whole.cosine,
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in told.items() if value is not None)


def _colour(share: float) -> str:
    """From light to dark; the lightness falls evenly."""
    mixed = (round(least + (most - least) * min(1.0, share)) for least, most in zip(_LEAST, _MOST, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _label(name: str) -> str:
    return shown(name or "in no layer")


def _text(value: str) -> str:
    return escape(_label(value))
