"""The page of the language suite: the tasks, and what a merge must not break."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from continual.making import DEFAULT, DEFAULT_OF_ADAPTERS
from tests.campaigns.bench.quality.figures import Table

READS = ("paper", "default", "sum", "tuned")
FORMS = {
    "full": "full fine-tunes",
    "lora": "LoRA adapters",
    "shared": "LoRA adapters that share their first factors",
    "kept": "in a state of adapters",
}


def page(found: Sequence[Table]) -> Iterator[str]:
    """The whole page, line by line."""
    yield "# Merge quality on a language model, measured"
    yield ""
    yield from Path(__file__).with_name("preface_language.md").read_text().strip().split("\n")
    for table in found:
        yield ""
        yield f"## {title(table)}"
        yield ""
        yield from accuracies(table)
        yield ""
        yield from differences(table)


def title(table: Table) -> str:
    """What was merged, and how: `language-lora` and `kept` are LoRA adapters in a state of adapters."""
    _, *forms = f"{table.suite}-{table.form}".split("-")
    return f"{' '.join(FORMS[form] for form in forms)}, up to {table.most}"


def accuracies(table: Table) -> Iterator[str]:
    """Mean accuracy, and behind it the neutral perplexity and the facts that are answered."""
    rows, counts = ways(table)
    heads = [head(table, count) for count in counts]
    yield "| rule | read | " + " | ".join(heads) + " |"
    yield "|---" * (len(counts) + 2) + "|"
    default = DEFAULT_OF_ADAPTERS if table.form == "kept" else DEFAULT
    for rule, read in (("base", "paper"), ("own", "paper"), *rows):
        name = {"base": "base", "own": "each model, own task"}.get(rule, f"**{rule}**" if rule == default else rule)
        cells = [cell(table, rule, count, read) for count in counts]
        yield f"| {name} | {'' if rule in ('base', 'own') else read} | " + " | ".join(cells) + " |"


def differences(table: Table) -> Iterator[str]:
    """What each way of reading gains on the default rule as it is read by default, with its intervals."""
    rows, counts = ways(table)
    yield f"| less {DEFAULT}, default | read | " + " | ".join(head(table, count) for count in counts) + " |"
    yield "|---" * (len(counts) + 2) + "|"
    for way in rows:
        if way != (DEFAULT, "default"):
            found = [table.difference(way, (DEFAULT, "default"), count) for count in counts]
            cells = [
                "" if c is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(round(x, 1) + 0.0 for x in c)) for c in found
            ]
            yield f"| {way[0]} | {way[1]} | " + " | ".join(cells) + " |"


def ways(table: Table) -> tuple[list[tuple[str, str]], list[int]]:
    """Rules and how they were read, the best of all models first, and at which numbers of models."""
    found = {(rule, count, read) for _, rule, count, read in table.rows if rule not in ("base", "own")}
    counts = sorted({count for _, count, _ in found})
    rows = sorted({(rule, read) for rule, _, read in found}, key=lambda way: (way[0], READS.index(way[1])))
    rows.sort(key=lambda way: -(table.accuracy(way[0], counts[-1], way[1]) or (0.0, 0.0))[0])
    return rows, counts


def head(table: Table, count: int) -> str:
    """`4 models (3 orders)`."""
    orders = {order for order, rule, number, _ in table.rows if number == count and rule not in ("base", "own")}
    told = f" ({len(orders)} orders)" if len(orders) > 1 else ""
    return f"{count} model{'s' if count > 1 else ''}{told}"


def cell(table: Table, rule: str, count: int, read: str) -> str:
    """`77.9 (103, 94 %)`: accuracy, perplexity, facts."""
    right = table.accuracy(rule, count, read)
    if right is None:
        return ""
    perplexity, facts = (table.watched(rule, count, read, what) or 0.0 for what in ("perplexity", "facts"))
    return f"{right[0]:.1f} ({perplexity:.1f}, {100 * facts:.0f} %)"
