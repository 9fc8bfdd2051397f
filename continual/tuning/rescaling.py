"""Changing by hand how the merged model is read, or back to what was tuned: a record, and nothing is folded again."""

from __future__ import annotations

from continual.errors import Misconfigured
from continual.rules import ReadOptions, read_options
from continual.state import State
from continual.state.entries import ScaleEntry
from continual.tuning import record


def rescale(state: State, rule: str, scale: str | None, lines: str | None) -> ReadOptions:
    """Records how the merged model of `state`, whose rule is `rule`, is read from now on, and returns it; what is None
    stays as it is. Nothing is recorded where nothing changes.

    `scale` is a text that `read_options` understands, or `tuned`: what the newest tuning chose, its layer scaling too.
    Raises Misconfigured for texts that are malformed, and for `tuned` where nothing was tuned.
    """
    now = ReadOptions.from_mapping(state.ledger.read_options(state.ledger.head.seq))
    of = None
    if scale == "tuned":
        found = record.newest(state)
        if found is None:
            raise Misconfigured("scale = tuned: nothing was tuned yet; run 'continual tune' first")
        chosen = record.chosen(found)
        then = read_options(rule, None, lines, chosen)
        if then == chosen and record.in_force(state) != found:
            of = found.seq
    else:
        then = read_options(rule, scale, lines, now)
    if then != now or of is not None:
        state.record(ScaleEntry(read=then.to_mapping(), of=of, message=f"scale {then}"))
    return then
