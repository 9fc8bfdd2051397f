"""The page of the language suite: the tasks, and what a merge must not break."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from continual.making import DEFAULT
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


def title(table: Table) -> str:
    """What was merged, and how: `language-lora` and `kept` are LoRA adapters in a state of adapters."""
    _, *forms = f"{table.suite}-{table.form}".split("-")
    return f"{' '.join(FORMS[form] for form in forms)}, up to {table.most}"


def accuracies(table: Table) -> Iterator[str]:
    """Mean accuracy, and behind it the neutral perplexity and the facts that are answered."""
    ways = sorted({(rule, read) for _, rule, _, read in table.rows}, key=lambda way: (way[0], READS.index(way[1])))
    rows = [way for way in ways if way[0] not in ("base", "own")]
    counts = sorted({count for _, rule, count, _ in table.rows if rule not in ("base", "own")})
    yield "| rule | read | " + " | ".join(f"{count} model{'s' if count > 1 else ''}" for count in counts) + " |"
    yield "|---" * (len(counts) + 2) + "|"
    last = counts[-1:]
    rows.sort(key=lambda way: -(table.accuracy(way[0], last[0], way[1]) or (0.0, 0.0))[0] if last else 0.0)
    for rule, read in (("base", "paper"), ("own", "paper"), *rows):
        name = {"base": "base", "own": "each model, own task"}.get(rule, f"**{rule}**" if rule == DEFAULT else rule)
        cells = [cell(table, rule, count, read) for count in counts]
        yield f"| {name} | {'' if rule in ('base', 'own') else read} | " + " | ".join(cells) + " |"


def cell(table: Table, rule: str, count: int, read: str) -> str:
    """`77.9 (103, 94 %)`: accuracy, perplexity, facts."""
    right = table.accuracy(rule, count, read)
    if right is None:
        return ""
    perplexity, facts = (table.watched(rule, count, read, what) or 0.0 for what in ("perplexity", "facts"))
    return f"{right[0]:.1f} ({perplexity:.1f}, {100 * facts:.0f} %)"
