"""The tables of the quality benchmark's pages, from its results. What the pages say beside them is written there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from continual.rules import RULES
from tests.campaigns.bench.quality import drawing
from tests.campaigns.bench.quality import report_language as language
from tests.campaigns.bench.quality.campaign import MULTIPLES
from tests.campaigns.bench.quality.figures import Table, load
from tests.campaigns.bench.quality.sections import Section, update, written

READS = ("paper", "default", "tuned")
SHOWN = (4, 8)


def tables(work: Path) -> list[Table]:
    """The results in the folder, those of a suite side by side."""
    found = [load(file) for file in sorted(work.glob("*-*.jsonl"))]
    if not found:
        raise SystemExit(f"{work}: no results; run python -m tests.campaigns.bench.quality --work {work} first")
    return found


def show(work: Path) -> None:
    """Prints the tables."""
    found = tables(work)
    for watching, make in ((True, language.page), (False, page)):
        if some := [table for table in found if table.watches == watching]:
            print(written("", list(make(some))))


def write(work: Path, folder: Path) -> None:
    """Puts the tables into quality.md, draws quality.svg, and those of the suites that say what must not break into
    quality-language.md: what there are results of. All else that the pages say stays."""
    found = tables(work)
    watching = [table for table in found if table.watches]
    if watching:
        update(folder / "quality-language.md", "Merge quality on a language model, measured", language.page(watching))
    others = [table for table in found if not table.watches]
    if others:
        update(folder / "quality.md", "Merge quality, measured", page(others))
        drawing.draw(folder)


def page(found: Sequence[Table]) -> Iterator[Section]:
    """The sections of quality.md that are made of these results."""
    for table in found:
        one = (accuracies, differences) if table.tuned else (language.accuracies, language.differences)
        yield Section(title(table), [list(make(table)) for make in one])
    yield Section(language.PROMISED, [list(language.promises(found))], keys=1)
    if any(table.tuned for table in found):
        yield Section("Around the default's number", [list(curves(found))], keys=2)
    yield Section("What a fold takes", [list(costs(found))], keys=2)


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


def curves(found: Sequence[Table]) -> Iterator[str]:
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


def costs(found: Sequence[Table]) -> Iterator[str]:
    """CPU seconds, peak memory and state of each rule, on the full fine-tunes of each suite."""
    yield "| rule | suite | CPU s a fold | VmHWM, MB | state, MB |"
    yield "|---" * 5 + "|"
    for name in RULES:
        for table in (table for table in found if table.form == "full"):
            cpu, peak, state = (table.cost(name, what) for what in ("cpu", "peak", "state"))
            if cpu:
                told = f"{sum(cpu) / len(cpu):.2f} | {max(peak) / 1e6:.0f} | {state[-1] / 1e6:.3g}"
                yield f"| {name} | {table.suite} | {told} |"


def _cell(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}" if found[1] >= 0.05 else f"{found[0]:.1f}"
