"""The fold rules: `rule` makes one by name, `RULES` lists them. What a rule is stands in `contract`; each module is one
rule, written like its paper."""

from continual.rules.before import TRANSFORMS
from continual.rules.contract import (
    LARGE,
    Accumulators,
    Counts,
    Factored,
    Folded,
    FoldFunctions,
    Inputs,
    Laws,
    Needs,
    Pass,
    ReadFunctions,
    Rule,
    RuleRow,
    Sums,
    Triplets,
)
from continual.rules.first_rows import first_of
from continual.rules.layer_inputs import LayerInputs
from continual.rules.options import NoOptions, Option
from continual.rules.registry import (
    ROWS,
    RULES,
    ReadAs,
    check_terms,
    must_keep_adapters,
    read_as,
    read_options,
    reader,
    readings,
    rule,
    rule_of,
    terms_of,
)
from continual.rules.scale import ReadOptions, ScaleFactors, Size
from continual.rules.sums import figures_of, last_out, settle, together
from continual.rules.terms import ModelTerms, TermFactors

__all__ = [
    "LARGE",
    "ROWS",
    "RULES",
    "TRANSFORMS",
    "Accumulators",
    "Counts",
    "Factored",
    "FoldFunctions",
    "Folded",
    "Inputs",
    "Laws",
    "LayerInputs",
    "ModelTerms",
    "Needs",
    "NoOptions",
    "Option",
    "Pass",
    "ReadAs",
    "ReadFunctions",
    "ReadOptions",
    "Rule",
    "RuleRow",
    "ScaleFactors",
    "Size",
    "Sums",
    "TermFactors",
    "Triplets",
    "check_terms",
    "figures_of",
    "first_of",
    "last_out",
    "must_keep_adapters",
    "read_as",
    "read_options",
    "reader",
    "readings",
    "rule",
    "rule_of",
    "settle",
    "terms_of",
    "together",
]
