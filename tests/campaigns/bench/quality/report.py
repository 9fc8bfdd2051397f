"""The page of the quality benchmark, from its results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from continual.rules import RULES
from tests.campaigns.bench.quality import drawing
from tests.campaigns.bench.quality import report_language as language
from tests.campaigns.bench.quality.campaign import MULTIPLES
from tests.campaigns.bench.quality.figures import Table, load

READS = ("paper", "default", "tuned")
SHOWN = (4, 8)


def tables(work: Path) -> list[Table]:
    """The results in the folder, those of a suite side by side."""
    found = [load(file) for file in sorted(work.glob("*-*.jsonl"))]
    if not found:
        raise SystemExit(f"{work}: no results; run python -m tests.campaigns.bench.quality --work {work} first")
    return found


def show(work: Path) -> None:
    """Prints the pages."""
    found = tables(work)
    for watching, make in ((True, language.page), (False, page)):
        if some := [table for table in found if table.watches == watching]:
            print("\n".join(make(some)))


def write(work: Path, folder: Path) -> None:
    """Writes quality.md and quality.svg, and quality-language.md of the suites that say what must not break: what there
    are results of."""
    found = tables(work)
    watching = [table for table in found if table.watches]
    if watching:
        (folder / "quality-language.md").write_text("\n".join(language.page(watching)) + "\n")
    others = [table for table in found if not table.watches]
    if others:
        (folder / "quality.md").write_text("\n".join(page(others)) + "\n")
        drawing.draw(folder)


def page(found: list[Table]) -> Iterator[str]:
    """The whole page, line by line."""
    yield "# Merge quality, measured"
    yield ""
    yield from (Path(__file__).with_name("preface.md").read_text().strip().split("\n"))
    for table in found:
        yield ""
        yield f"## {title(table)}"
        yield ""
        yield from (accuracies if table.tuned else language.accuracies)(table)
        yield ""
        yield from (differences if table.tuned else language.differences)(table)
    some = [table for table in found if not table.tuned]
    if some:
        yield ""
        yield "## What is promised, cell by cell"
        yield ""
        yield from language.promises(some)
    if any(table.tuned for table in found):
        yield ""
        yield "## Around the default's number"
        yield ""
        yield (
            "Mean accuracy on *validation* rows, over orders and numbers of models, "
            "where the default's number is multiplied: how"
        )
        yield "well it is chosen, and how flat the top is."
        yield ""
        yield from curves(found)
    yield ""
    yield "## What a fold takes"
    yield ""
    yield from costs(found)
    yield ""
    yield from (Path(__file__).with_name("postface.md").read_text().strip().split("\n"))


def title(table: Table) -> str:
    """`text, LoRA adapters in a state of adapters, 8 tasks`."""
    return f"{table.suite.rstrip('0123456789')}, {merged(table)}, {table.most} tasks"


def merged(table: Table) -> str:
    """What was merged, and how."""
    made = "full fine-tunes" if table.form == "full" else language.FORMS[table.form]
    return f"{made} in a state of adapters" if table.kept else made


def shown(table: Table) -> list[int]:
    """The numbers of models that the wide table has, all of them last."""
    return [*(count for count in SHOWN if count < table.most), table.most]


def accuracies(table: Table) -> Iterator[str]:
    """Accuracy by rule, number of models and way of reading; the ends; retention and backward transfer."""
    counts = shown(table)
    yield "| rule | " + " | ".join(f"{c}: {read}" for c in counts for read in READS) + " | retention | backward |"
    yield "|---" * (len(counts) * len(READS) + 3) + "|"
    for rule in ("base", "own"):
        cells = [
            _cell(table.accuracy(rule, count, "paper")) if read == "paper" else "" for count in counts for read in READS
        ]
        yield f"| {'base' if rule == 'base' else 'each fine-tune, own task'} | " + " | ".join(cells) + " | | |"
    for rule in sorted(table.rules, key=lambda r: -(table.accuracy(r, table.most) or (0, 0))[0]):
        cells = [_cell(table.accuracy(rule, count, read)) for count in counts for read in READS]
        ours, own, gain = (
            table.accuracy(rule, table.most),
            table.accuracy("own", table.most, "paper"),
            table.transfer(rule),
        )
        kept = f"{100 * ours[0] / own[0]:.1f} %" if ours and own else ""
        name = f"**{rule}**" if rule == table.default else rule
        yield f"| {name} | " + " | ".join(cells) + f" | {kept} | {'' if gain is None else f'{gain:+.1f}'} |"


def differences(table: Table) -> Iterator[str]:
    """What decides, with its intervals."""
    pairs = (
        ("opcm as its paper ships it", ("opcm", "paper")),
        ("plain averaging", ("mean", "paper")),
        ("the same rule, tuned on validation rows", (table.default, "tuned")),
        *((f"{name}, default", (name, "default")) for name in ("gram", "tsv-m", "iso-c") if name != table.default),
    )
    counts = shown(table)
    yield f"| {table.default} as it is read by default, less … | " + " | ".join(f"{c} tasks" for c in counts) + " |"
    yield "|---" * (len(counts) + 1) + "|"
    for told, other in pairs:
        cells = [table.difference((table.default, "default"), other, count) for count in counts]
        yield (
            f"| {told} | "
            + " | ".join("" if c is None else f"{c[0]:+.1f} [{c[1]:+.1f}, {c[2]:+.1f}]" for c in cells)
            + " |"
        )


def curves(found: list[Table]) -> Iterator[str]:
    """Validation accuracy against multiples of the default's number."""
    yield "| rule | suite | " + " | ".join(f"× {multiple:.3g}" for multiple in MULTIPLES) + " |"
    yield "|---" * (len(MULTIPLES) + 2) + "|"
    for name in RULES:
        for table in found:
            rows = [
                list(row["validation"].values())
                for (_, rule, _, read), row in sorted(table.rows.items())
                if (rule, read) == (name, "tuned") and "validation" in row
            ]
            if rows:
                means = [100 * sum(column) / len(rows) for column in zip(*rows, strict=True)]
                cells = [f"**{mean:.1f}**" if mean == max(means) else f"{mean:.1f}" for mean in means]
                yield f"| {name} | {table.suite}, {table.form} | " + " | ".join(cells) + " |"


def costs(found: list[Table]) -> Iterator[str]:
    """CPU seconds, peak memory and state of each rule, on the full fine-tunes of each suite."""
    full = [table for table in found if table.form == "full"]
    names = [name for name in RULES if any(name in table.rules for table in full)]
    yield (
        "| rule | "
        + " | ".join(f"{t.suite}: CPU s a fold | {t.suite}: VmHWM, MB | {t.suite}: state, MB" for t in full)
        + " |"
    )
    yield "|---" * (3 * len(full) + 1) + "|"
    for name in names:
        cells = []
        for table in full:
            cpu, peak, state = (table.cost(name, what) for what in ("cpu", "peak", "state"))
            cells += (
                [f"{sum(cpu) / len(cpu):.2f}", f"{max(peak) / 1e6:.0f}", f"{state[-1] / 1e6:.3g}"]
                if cpu
                else ["", "", ""]
            )
        yield f"| {name} | " + " | ".join(cells) + " |"


def _cell(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}" if found[1] >= 0.05 else f"{found[0]:.1f}"
