"""The list of the rules, and how one is made, and read, by its name.

To add a rule write its module, and put its row into the list here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from continual.errors import Misconfigured
from continual.rules import before
from continual.rules.chain import chain
from continual.rules.contract import Rule, RuleRow
from continual.rules.fisher import FISHER
from continual.rules.gram import GRAM
from continual.rules.iso_c import ISO_C
from continual.rules.magmax import MAGMAX
from continual.rules.opcm import OPCM
from continual.rules.scale import ReadOptions
from continual.rules.ties import TIES
from continual.rules.tsv_m import TSV_M
from continual.rules.weighted import FRANK_WOLFE, MEAN, TASK_ARITHMETIC

_LIST: tuple[RuleRow[Any], ...] = (
    MEAN,
    TASK_ARITHMETIC,
    FISHER,
    TIES,
    MAGMAX,
    ISO_C,
    TSV_M,
    GRAM,
    OPCM,
    FRANK_WOLFE,
)
ROWS: Mapping[str, RuleRow[Any]] = {row.name: row for row in _LIST}
"""All that a state can be made with, by name."""
RULES: Mapping[str, RuleRow[Any]] = {name: row for name, row in ROWS.items() if not row.rule().laws.rounds}
"""Those that fold one model after the other; the others weigh them in rounds."""


def rule(name: str, options: Mapping[str, object] | None = None) -> Rule:
    """The rule `name` with its fold-time options; those not given take their defaults. `.options` of the result are all
    of them, as plain data.

    Every rule has the option `before`: a list of transforms that are done to each task vector first (see
    `continual.rules.before`).

    Raises Misconfigured for an unknown rule or option, or a value that is not allowed; the message lists what is.
    """
    given = dict(options or {})
    transforms = before.parse(given.pop("before", []))
    made = row(name).rule(given)
    if made.laws.rounds and transforms:
        raise Misconfigured(
            f"before: {name} weighs the task vectors as they are; leave the transforms out, or take another rule"
        )
    return chain(made, transforms) if transforms else made


def row(name: str) -> RuleRow[Any]:
    """The rule `name` in the list. Raises Misconfigured for an unknown name."""
    if name not in ROWS:
        raise Misconfigured(f"unknown rule {name!r}; the rules are: {', '.join(sorted(ROWS))}")
    return ROWS[name]


def read_options(
    name: str, text: str | None = None, lines: str | None = None, now: ReadOptions | None = None
) -> ReadOptions:
    """How a state of the rule `name` is read: at the scale `text` (`auto` is the rule's default, `paper` as it was
    published) and with the layer scaling `lines`.

    What is not given stays as `now`, or is the rule's default.

    Raises Misconfigured for an unknown rule, malformed texts, or a scale that the rule does not know.
    """
    known = row(name)
    named = {"auto": known.read, "paper": known.published or known.read}
    found, layers = now or known.read, now.lines if now else None
    if text is not None:
        found = named[text] if text in named else ReadOptions.parse(text)
    if lines is not None:
        layers = ReadOptions.parse_lines(lines)
    if found.policy == "spread" and not known.spectral:
        spectral = ", ".join(other.name for other in RULES.values() if other.spectral)
        raise Misconfigured(f"scale = {text}: {name} treats every tensor alike; spread is for {spectral}")
    return ReadOptions(found.policy, found.value, layers)
