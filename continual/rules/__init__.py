"""The fold rules: `rule` makes one by name, `RULES` lists them. What a rule is stands in `contract`; each module is one
rule, written like its paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from continual.errors import Misconfigured
from continual.rules import before
from continual.rules.before import TRANSFORMS
from continual.rules.contract import Accumulators, Folded, Inputs, Measured, Option, Row, Rule, Sums, Totals, resolve
from continual.rules.fisher import FISHER
from continual.rules.gram import GRAM
from continual.rules.iso_c import ISO_C
from continual.rules.magmax import MAGMAX
from continual.rules.opcm import OPCM
from continual.rules.scale import ReadOptions, Size
from continual.rules.sums import FRANK_WOLFE, MEAN, TASK_ARITHMETIC, together
from continual.rules.ties import TIES
from continual.rules.tsv_m import TSV_M

__all__ = [
    "ROWS",
    "RULES",
    "TRANSFORMS",
    "Accumulators",
    "Folded",
    "Inputs",
    "Measured",
    "Option",
    "ReadOptions",
    "Row",
    "Rule",
    "Size",
    "Sums",
    "Totals",
    "read_options",
    "rule",
    "together",
]

RULES: Mapping[str, Row] = {
    row.name: row for row in (MEAN, TASK_ARITHMETIC, FISHER, TIES, MAGMAX, ISO_C, TSV_M, GRAM, OPCM)
}
"""Every rule that folds one model after the other, by name."""
ROWS: Mapping[str, Row] = {**RULES, FRANK_WOLFE.name: FRANK_WOLFE}
"""All that a state can be made with: the rules, and what rounds weigh."""


def rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with its fold-time options; those not given take their defaults. `.options` of the result are all
    of them, as plain data.

    Every rule has the option `before`: a list of transforms that are done to each task vector first (see
    `continual.rules.before`).

    Raises Misconfigured for an unknown rule or option, or a value that is not allowed; the message lists what is.
    """
    row = _row(name)
    given = dict(options or {})
    transforms = before.parse(given.pop("before", []))
    made = row.make(resolve(f"rule {name}", row.options, given))
    if made.rounds and transforms:
        raise Misconfigured(
            f"before: {name} weighs the task vectors as they are; leave the transforms out, or take another rule"
        )
    return before.chain(made, transforms) if transforms else made


def read_options(
    name: str, text: str | None = None, lines: str | None = None, now: ReadOptions | None = None
) -> ReadOptions:
    """How a state of this rule is read: at the scale `text` (`auto` is the rule's default, `paper` as it was published)
    and with the layer scaling `lines`.

    What is not given stays as `now`, or is the rule's default.

    Raises Misconfigured for an unknown rule, malformed texts, or a scale that the rule does not know.
    """
    row = _row(name)
    named = {"auto": row.read, "paper": row.published or row.read}
    found = named[text] if text in named else (now or row.read) if text is None else ReadOptions.parse(text)
    layers = (now.lines if now else None) if lines is None else ReadOptions.parse_lines(lines)
    if found.policy == "spread" and not row.spectral:
        raise Misconfigured(
            f"scale = {text}: {name} treats every tensor alike; spread is for {', '.join(r.name for r in RULES.values() if r.spectral)}"
        )
    return ReadOptions(found.policy, found.value, layers)


def _row(name: str) -> Row:
    if name not in ROWS:
        raise Misconfigured(f"unknown rule {name!r}; the rules are: {', '.join(sorted(ROWS))}")
    return ROWS[name]
