"""The tables of the language suite's page: the tasks, and what a merge must not break. They serve the other suites
too, where no scale was tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from continual.rules import RULES
from tests.campaigns.bench.quality.campaign import READS
from tests.campaigns.bench.quality.figures import Table
from tests.campaigns.bench.quality.sections import Section

FORMS = {
    "full": "Full fine-tunes",
    "lora": "LoRA adapters",
    "shared": "LoRA adapters that share their first factors",
    "seeded": "LoRA adapters whose first factors began alike",
}

PROMISED = "What is promised, cell by cell"
WITHOUT_DATA = ("default", "paper", "sum")
"""The ways of reading that no data chose. Of scales that are named nobody knows."""


def page(found: Sequence[Table]) -> Iterator[Section]:
    """The sections that are made of these results."""
    alone = [one_model(found)] if any(_alone(table) for table in found) else []
    yield Section(PROMISED, [list(made) for made in (promises(found), *alone)], keys=1)
    for table in found:
        yield Section(title(table), [list(accuracies(table)), list(differences(table))])


def title(table: Table) -> str:
    """What was merged, and how."""
    return f"{FORMS[table.form]}{' in a state of adapters' if table.kept else ''}, up to {table.most}"


def promises(found: Sequence[Table]) -> Iterator[str]:
    """The default as it is read by default, against the best reading without data, OPCM as published, and where the
    suites say it the neutral perplexity that is allowed."""
    watched = " perplexity (allowed) | facts |" if all(table.watches for table in found) else ""
    yield (
        "| merged | default | accuracy | best without data | default less it | default less OPCM as published |"
        + watched
    )
    yield "|---" * (8 if watched else 6) + "|"
    for table in found:
        default = (table.default, "default")
        for count in table.checkpoints:
            right = table.accuracy(table.default, count)
            if right is None:
                continue
            others = [way for way in table.ways(count) if way[1] in WITHOUT_DATA and way != default]
            gaps = {way: gap for way in others if (gap := table.difference(default, way, count))}
            best = min(gaps, key=lambda way: gaps[way][0], default=None)
            told = "none other asked" if best is None else f"{best[0]}, {best[1]}"
            if best is not None and gaps[best][0] >= 0.0:
                told = f"the default; next {told}"
            times = orders(table, count)
            name = f"{made(table)}, {count} of {table.most}{f' ({times} orders)' if times > 1 else ''}"
            yield (
                f"| {name} | {table.default} | {right[0]:.1f} | {told} | "
                f"{interval(gaps.get(best) if best else None)} | {interval(gaps.get(('opcm', 'paper')))} |"
                + (unbroken(table, count) if watched else "")
            )


def made(table: Table) -> str:
    """What was merged, in a table of several suites with the suite and the form of state."""
    if table.watches:
        return FORMS[table.form]
    return f"{table.suite.rstrip('0123456789')}: {FORMS[table.form]}{' in a state of adapters' if table.kept else ''}"


def unbroken(table: Table, count: int) -> str:
    """The cells of what the default must not break."""
    perplexity, facts = (table.watched(table.default, count, "default", what) or 0.0 for what in WATCHED)
    allowed = table.allowed()
    return f" {perplexity:.1f} ({'not asked' if allowed is None else f'{allowed:.1f}'}) | {100 * facts:.0f} % |"


def _alone(table: Table) -> Mapping[str, Any]:
    return table.rows.get((0, table.default, table.most, "alone"), {})


def one_model(found: Sequence[Table]) -> Iterator[str]:
    """One model read as a merge, against the model itself."""
    yield "| one model | rule | accuracy as a merge of one | itself | largest difference of one model's τ, relative |"
    yield "|---" * 5 + "|"
    for table in found:
        row = _alone(table)
        if row:
            read, own = (table.accuracy(rule, table.most, way) for rule, way in ((table.default, "alone"), OWN))
            yield (
                f"| {FORMS[table.form]}, mean of {table.most} | {table.default} | {(read or (0.0,))[0]:.1f} | "
                f"{(own or (0.0,))[0]:.1f} | {row['apart']:.1e} |"
            )


WATCHED = ("perplexity", "facts")
OWN = ("own", "paper")


def accuracies(table: Table) -> Iterator[str]:
    """Mean accuracy, and behind it the neutral perplexity and the facts that are answered."""
    counts = table.checkpoints
    yield "| rule | read | " + " | ".join(head(table, count) for count in counts) + " |"
    yield "|---" * (len(counts) + 2) + "|"
    for rule, read in (("base", "paper"), OWN, *ways(table)):
        name = {"base": "base", "own": "each model, own task"}.get(rule, marked(table, rule))
        cells = [cell(table, rule, count, read) for count in counts]
        yield f"| {name} | {'' if rule in ('base', 'own') else read} | " + " | ".join(cells) + " |"


def differences(table: Table) -> Iterator[str]:
    """What each way of reading gains on the default rule as it is read by default, with its intervals."""
    counts = table.checkpoints
    yield f"| less {table.default}, default | read | " + " | ".join(head(table, count) for count in counts) + " |"
    yield "|---" * (len(counts) + 2) + "|"
    for rule, read in ways(table):
        if (rule, read) != (table.default, "default"):
            found = [table.difference((rule, read), (table.default, "default"), count) for count in counts]
            yield f"| {rule} | {read} | " + " | ".join(interval(one) for one in found) + " |"


def ways(table: Table) -> list[tuple[str, str]]:
    """Rules and how they were read, the best of all models first; behind them what was asked of fewer alone."""
    counts = table.checkpoints
    rows = sorted({way for c in counts for way in table.ways(c)}, key=_place)
    return sorted(rows, key=lambda way: [-(table.accuracy(way[0], c, way[1]) or (0.0,))[0] for c in counts[::-1]])


def _place(way: tuple[str, str]) -> tuple[str, int, str]:
    """By rule; scales that were named come behind the other ways of reading."""
    rule, read = way
    return rule, READS.index(read) if read in READS else len(READS), read


def marked(table: Table, rule: str) -> str:
    """The rule's name, bold where it is the default."""
    return f"**{rule}**" if rule == table.default else rule


def orders(table: Table, count: int) -> int:
    """In how many orders a merge of so many models was asked at most."""
    return max(len(table.asked(rule, count, read)) for rule, read in table.ways(count))


def head(table: Table, count: int) -> str:
    """`4 models (3 orders)`."""
    told = f" ({orders(table, count)} orders)" if orders(table, count) > 1 else ""
    return f"{count} model{'s' if count > 1 else ''}{told}"


def cell(table: Table, rule: str, count: int, read: str) -> str:
    """`77.9 (103, 94 %)`: accuracy, perplexity, facts, these where the suite says them; `1 order: ...` where it was
    asked in fewer than others were, and another order could differ."""
    right = table.accuracy(rule, count, read)
    if right is None:
        return ""
    asked = len(table.asked(rule, count, read))
    once = count == table.most and (rule not in RULES or RULES[rule].rule().laws.order_free)
    fewer = f"{asked} order{'s' if asked > 1 else ''}: " if not once and 0 < asked < orders(table, count) else ""
    if not table.watches:
        return f"{fewer}{right[0]:.1f}"
    perplexity, facts = (table.watched(rule, count, read, what) or 0.0 for what in WATCHED)
    return f"{fewer}{right[0]:.1f} ({perplexity:.1f}, {100 * facts:.0f} %)"


def interval(found: tuple[float, float, float] | None) -> str:
    """`+1.2 [-0.3, +2.7]`, without a minus before 0."""
    return "" if found is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(round(x, 1) + 0.0 for x in found))
