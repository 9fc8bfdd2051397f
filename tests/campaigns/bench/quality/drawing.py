"""The plot of the quality benchmark, out of the tables of its page, so that the two say the same.

python -m tests.campaigns.bench.quality.drawing ops/docs       # quality.svg beside quality.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from continual.making import DEFAULT

LINES = (
    (DEFAULT, "default", f"{DEFAULT} (default)", "-", "C1"),
    ("tsv-m", "default", "tsv-m", "-", "C0"),
    ("gram", "default", "gram", "-", "C2"),
    ("opcm", "paper", "opcm as published", "--", "C3"),
    ("task-arithmetic", "paper", "task arithmetic × 0.3", ":", "C4"),
    ("mean", "paper", "plain average", ":", "C5"),
    ("each fine-tune, own task", "paper", "each fine-tune, own task", "-", "0.75"),
    ("base", "paper", "base", "-", "0.55"),
)
"""Of each line its row and its way of reading, its label, style and colour."""


@dataclass(frozen=True)
class Panel:
    """A table of the page with its heading: accuracy in per cent by row and column (`8: default`)."""

    title: str
    cells: Mapping[tuple[str, str], float]

    def line(self, rule: str, read: str) -> list[tuple[int, float]]:
        """Numbers of models, and the accuracy at each."""
        ends = f": {read}"
        known = ((column, value) for (row, column), value in self.cells.items() if row == rule)
        return sorted((int(column.removesuffix(ends)), value) for column, value in known if column.endswith(ends))


def panels(page: str) -> Iterator[Panel]:
    """The tables whose columns are numbers of models and ways of reading."""
    for section in re.split(r"^#+ ", page, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        head, rows = [], {}
        for line in body.splitlines():
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if not head and any(re.fullmatch(r"\d+: \w+", cell) for cell in cells):
                head = cells
            elif head and not cells:
                break
            elif head:
                named = zip(head[1:], cells[1:], strict=True)
                rows |= {
                    (cells[0], column): float(cell.split()[0])
                    for column, cell in named
                    if re.fullmatch(r"\d+: \w+", column) and re.match(r"\d", cell)
                }
        if rows:
            yield Panel(title, rows)


def draw(folder: Path) -> None:
    """Writes quality.svg beside quality.md: accuracy against the number of models, a panel for each table. Raises
    SystemExit where matplotlib or a table is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: python -m pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "continual"
    from matplotlib import pyplot

    found = list(panels((folder / "quality.md").read_text()))
    if not found:
        raise SystemExit(f"{folder / 'quality.md'}: no table by number of models and way of reading")
    rows = (len(found) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 3.6 * rows), squeeze=False)
    for panel, axis in zip(found, axes.flat, strict=False):
        for rule, read, label, style, colour in LINES:
            if not (line := panel.line(rule, read)):
                continue
            marker = None if rule in ("base", "each fine-tune, own task") else "o"
            axis.plot(*zip(*line, strict=True), style, color=colour, label=label, marker=marker, markersize=4)
        counts = sorted({count for rule, read, *_ in LINES for count, _ in panel.line(rule, read)})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("fine-tunes folded")
        axis.set_ylabel("mean accuracy, %")
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=9, loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(folder / "quality.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where quality.md is")
    draw(parser.parse_args().folder)


if __name__ == "__main__":
    main()
