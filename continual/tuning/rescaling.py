"""Changing by hand how the merged model is read, or back to what was tuned: a record, and nothing is folded again."""

from __future__ import annotations

from continual.engine.views import check_read_at
from continual.errors import Misconfigured
from continual.rules import ReadAs, ReadOptions, Rule, read_as
from continual.state import State
from continual.state.entries import ScaleEntry
from continual.tuning import record


def rescale(state: State, rule: Rule, wanted: ReadAs) -> ReadOptions:
    """Records how the merged model of `state`, which was made with `rule`, is read from now on, and returns it; what is
    None stays as it is, and another rule begins with its default. Nothing is recorded where nothing changes.

    The scale is a text that `read_options` understands, or `tuned`: what the newest tuning chose, its layer scaling and
    its rule too. Raises Misconfigured for texts that are malformed, for a rule that cannot read the state, and for
    `tuned` where nothing was tuned, or another rule was.
    """
    blocks = state.format.form is not None
    now = ReadOptions.from_mapping(state.ledger.read_options(state.ledger.head.seq))
    of = None
    if wanted.scale == "tuned":
        found = record.newest(state)
        if found is None:
            raise Misconfigured("scale = tuned: nothing was tuned yet; run 'continual tune' first")
        chosen = record.chosen(found)
        by = chosen.rule or rule.name
        if wanted.rule not in (None, by):
            raise Misconfigured(f"scale = tuned: what was tuned is read by {by}, not by {wanted.rule}")
        _, then = read_as(rule, chosen, ReadAs(by, None, wanted.lines), blocks=blocks)
        if then == chosen and record.in_force(state) != found:
            of = found.seq
    else:
        _, then = read_as(rule, now, wanted, blocks=blocks)
    check_read_at(state, rule, then, state.ledger.head.seq)
    if then != now or of is not None:
        state.record(ScaleEntry(read=then.to_mapping(), of=of, message=f"scale {then}"))
    return then
