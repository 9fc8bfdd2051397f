"""The list of the rules, and how one is made, and read, by its name.

A rule says what is folded and what is made of it. A state goes on with the rule that it was made with; it can be read
by another that keeps the same of each tensor, and a state of adapters, which keeps no rule's accumulators, by nearly
any.

To add a rule write its module, and put its row into the list here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from continual.errors import Misconfigured
from continual.rules import before
from continual.rules.chain import chain
from continual.rules.contract import Rule, RuleRow
from continual.rules.dc import DC
from continual.rules.esm import ESM, TSV_W
from continual.rules.fisher import FISHER
from continual.rules.flow import FLOW
from continual.rules.gram import GRAM
from continual.rules.iso_c import ISO_C
from continual.rules.iso_cts import ISO_CTS
from continual.rules.isotropic import ISOTROPIC
from continual.rules.magmax import MAGMAX
from continual.rules.opcm import OPCM
from continual.rules.regmean import REGMEAN
from continual.rules.scale import ReadOptions
from continual.rules.ties import TIES
from continual.rules.tsv_even import TSV_EVEN
from continual.rules.tsv_flow import TSV_FLOW
from continual.rules.tsv_m import TSV_M
from continual.rules.tsv_u import TSV_U
from continual.rules.weighted import FRANK_WOLFE, MEAN, TASK_ARITHMETIC

_LIST: tuple[RuleRow[Any], ...] = (
    MEAN,
    TASK_ARITHMETIC,
    FISHER,
    TIES,
    MAGMAX,
    ISO_C,
    TSV_M,
    TSV_EVEN,
    TSV_U,
    TSV_W,
    ISOTROPIC,
    ESM,
    DC,
    ISO_CTS,
    TSV_FLOW,
    GRAM,
    FLOW,
    OPCM,
    REGMEAN,
    FRANK_WOLFE,
)
ROWS: Mapping[str, RuleRow[Any]] = {row.name: row for row in _LIST}
"""All that a state can be made with, by name."""
RULES: Mapping[str, RuleRow[Any]] = {
    name: row for name, row in ROWS.items() if not (row.rule().laws.rounds or row.rule().needs.inputs)
}
"""Those that fold one model after the other. Of the others one weighs them in rounds, and one reads adapters alone."""


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


def rule_of(name: str, options: Mapping[str, object]) -> Rule:
    """The rule of a state that its record names with these options. Those that there were not when it was made are what
    they meant then. Raises Misconfigured as `rule`."""
    return rule(name, {**row(name).earlier, **options})


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


_APART = (
    "{} needs every model apart, and a merge of whole tensors keeps none: only a state made with 'continual init "
    "--adapters' can be read by it"
)


def must_keep_adapters(made: Rule) -> None:
    """Raises Misconfigured where a rule reads adapters alone, and a state of whole tensors is to be made with it."""
    if made.needs.inputs:
        raise Misconfigured(_APART.format(made.name))


class ReadAs(NamedTuple):
    """How somebody wants a state read, as texts; what is None stays as it is, or is the default of the rule that is
    named here. `options` are the rule's."""

    rule: str | None = None
    scale: str | None = None
    lines: str | None = None
    options: Mapping[str, object] = MappingProxyType({})


def readings(made: Rule, *, blocks: bool = False) -> list[str]:
    """The rules that a state made with `made` can be read by; with `blocks`, one that keeps adapters.
    One that finds its weights in rounds reads what it was made of alone."""
    if blocks:
        own = made.name if made.laws.rounds else None
        return [name for name, row in ROWS.items() if name == own or _reads_blocks(row.rule())]
    own = None if made.needs.inputs else made.name
    return [name for name, row in ROWS.items() if name == own or _has(made, row.rule(_shared(made, row)))]


def reader(made: Rule, name: str | None, options: Mapping[str, object] | None = None, *, blocks: bool = False) -> Rule:
    """The rule `name` (None: its own) as it reads a state made with `made`; with `blocks`, one that keeps adapters.
    Of a merge of whole tensors the `options` are those that matter at reading alone. Raises Misconfigured for an
    unknown rule or option, and one that cannot read it."""
    if name in (None, made.name) and not options:
        return made
    name = name or made.name
    known = row(name)
    if name not in readings(made, blocks=blocks):
        if known.rule().needs.inputs:
            raise Misconfigured(_APART.format(name))
        of = "a state of adapters" if blocks else f"a state made with {made.name}"
        raise Misconfigured(f"{of} cannot be read by {name}; it can be by {', '.join(readings(made, blocks=blocks))}")
    if blocks:
        return rule(name, options)
    if fixed := sorted(options or ()) if not made.laws.keeps else sorted({"before", "include"} & set(options or ())):
        raise Misconfigured(f"{name}: {', '.join(fixed)} is as the state was made with it, since the folds went by it")
    transforms = made.options.get("before")
    given = {**_shared(made, known), **(options or {}), **({"before": transforms} if transforms else {})}
    found = rule(name, given)
    if not _has(made, found):
        raise Misconfigured(f"{name} needs more with {dict(options or {})} than a state made with {made.name} keeps")
    return found


def read_as(made: Rule, now: ReadOptions, wanted: ReadAs, *, blocks: bool = False) -> tuple[Rule, ReadOptions]:
    """The rule by which a state made with `made` is read, and how: as `now`, but for what is `wanted`. Another rule
    begins with its own default scale. Raises Misconfigured for what is unknown or malformed, and for what the state
    cannot be read by."""
    name = wanted.rule or now.rule or made.name
    chosen = reader(made, name, wanted.options, blocks=blocks)
    before = now if name == (now.rule or made.name) else None
    if before is not None and wanted.scale is None and wanted.lines is None:
        found = before
    else:
        found = read_options(name, wanted.scale, wanted.lines, before)
    if found.policy == "spread" and made.read.matrix is None and not blocks:
        raise Misconfigured(
            f"scale = {found.scale}: a state made with {made.name} measures nothing of its matrices, which spread goes "
            "by; name another scale, as norm:2.45 or a number"
        )
    kept = before is not None and wanted.scale not in ("auto", "paper")  # which are the rule's own and nothing else
    of = now if kept else ReadOptions("number")
    by = None if name == made.name else name
    return chosen, dataclasses.replace(found, rule=by, weights=of.weights, layers=of.layers, terms=of.terms)


def terms_of(reads: Rule, *, blocks: bool = False) -> bool:
    """Whether X of a matrix is a sum with a term of each model as `reads` reads it, so that each can have a coefficient
    of its own; with `blocks`, from a state that keeps adapters. Else a state has to keep the models' triplets."""
    if reads.laws.rounds:
        return False  # the weights are those that rounds found
    if not blocks:
        return reads.read.terms is not None
    found = reads.factored
    if found is None:
        return False
    return found.owners is not None or found.by_inputs is not None or (found.cores is None and found.triplets is None)


def check_terms(reads: Rule, *, blocks: bool = False) -> None:
    """Raises Misconfigured where `terms_of` says no, saying which rules would do."""
    if not terms_of(reads, blocks=blocks):
        there = [name for name, row in ROWS.items() if terms_of(row.rule(), blocks=blocks)]
        of = "a state of adapters" if blocks else "a state of whole tensors"
        raise Misconfigured(
            f"{_named(reads)} reads no sum with a term of each model, so models have no coefficients of their own in a "
            f"layer; of {of} it is {', '.join(there)} that read{'' if len(there) > 1 else 's'} so, without transforms "
            "('continual rules'); or take a coefficient for each layer: --what layers"
        )


def _named(reads: Rule) -> str:
    before = reads.options.get("before")
    return f"{reads.name} with transforms before it" if before else reads.name


def _has(made: Rule, reads: Rule) -> bool:
    """Whether a state made with `made` keeps all that `reads` reads."""
    return bool(reads.laws.keeps) and reads.laws.keeps <= made.laws.keeps


def _shared(made: Rule, row: RuleRow[Any]) -> dict[str, object]:
    """The options of a state that its reader has too: they say what is kept."""
    return {option: value for option, value in made.options.items() if option in row.declared}


def _reads_blocks(one: Rule) -> bool:
    return not one.laws.rounds and one.needs.shipped is None
