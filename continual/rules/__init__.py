"""The fold rules: `rule` makes one by name, `RULES` lists them. What a rule is stands in `contract`; each module is one rule, written like its paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from continual.errors import Misconfigured
from continual.rules.contract import Accumulators, Folded, Inputs, Measured, Option, ReadOptions, Row, Rule, Sums, Totals
from continual.rules.gram import GRAM
from continual.rules.iso_c import ISO_C
from continual.rules.magmax import MAGMAX
from continual.rules.opcm import OPCM
from continual.rules.sums import MEAN, TASK_ARITHMETIC
from continual.rules.ties import TIES
from continual.rules.tsv_m import TSV_M

__all__ = [
    "RULES",
    "Accumulators",
    "Folded",
    "Inputs",
    "Measured",
    "Option",
    "ReadOptions",
    "Row",
    "Rule",
    "Sums",
    "Totals",
    "read_options",
    "rule",
]

RULES: Mapping[str, Row] = {row.name: row for row in (MEAN, TASK_ARITHMETIC, TIES, MAGMAX, ISO_C, TSV_M, GRAM, OPCM)}
"""Every rule by name."""


def rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with its fold-time options; those not given take their defaults. `.options` of the result are all of them, as plain data.

    Raises Misconfigured for an unknown rule or option, or a value that is not allowed; the message lists what is.
    """
    row = _row(name)
    given = dict(options or {})
    for unknown in sorted(set(given) - set(row.options)):
        raise Misconfigured(f"rule {name}: unknown option {unknown!r}; its options are: {', '.join(sorted(row.options)) or 'none'}")
    resolved = {}
    for key, option in row.options.items():
        try:
            resolved[key] = option.check(given.get(key, option.default))
        except ValueError as error:
            raise Misconfigured(f"rule {name}: {key} = {given[key]!r} has to be {error}") from None
    return row.make(resolved)


def read_options(name: str, text: str | None = None) -> ReadOptions:
    """How a state of this rule is read: as `text` says, or the rule's default. Raises Misconfigured for an unknown rule or a scale it does not know."""
    row = _row(name)
    found = row.read if text is None else ReadOptions.parse(text)
    if found.policy not in row.policies:
        raise Misconfigured(f"scale = {text}: {name} is scaled by {' or '.join(row.policies)} only; its default is {row.read}")
    return found


def _row(name: str) -> Row:
    if name not in RULES:
        raise Misconfigured(f"unknown rule {name!r}; the rules are: {', '.join(sorted(RULES))}")
    return RULES[name]
