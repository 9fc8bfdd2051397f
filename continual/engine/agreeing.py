"""Whether the settings are about the state that they name."""

from __future__ import annotations

from continual.config import Settings
from continual.errors import Misconfigured
from continual.rules import reader, rule, rule_of
from continual.state import State


def agree(state: State, settings: Settings) -> None:
    """Raises Misconfigured where the settings name another rule, or other fold-time options, than the state was made
    with, or a reading that it does not support."""
    made = state.format
    advice = f"{state.path} goes on as it was made; make a new state with 'continual init', or take the setting out"
    if settings.rule not in (None, made.rule):
        raise Misconfigured(f"rule = {settings.rule}, and the state was made with {made.rule}: {advice}")
    if settings.select is not None and (settings.select == "frank-wolfe") != (made.rule == "frank-wolfe"):
        why = (
            "it weighs its models in rounds"
            if made.rule == "frank-wolfe"
            else "only a state of the rule frank-wolfe can be weighed so"
        )
        raise Misconfigured(f"select = {settings.select}, and the state was made with {made.rule}: {why}; {advice}")
    if settings.reading is not None:
        reader(rule_of(made.rule, made.options), settings.reading, blocks=made.form is not None)
    before = {} if settings.before is None else {"before": list(settings.before)}
    found = rule_of(made.rule, made.options).options
    wanted = rule(made.rule, {**found, **settings.options, **before}).options
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            raise Misconfigured(f"{key} = {wanted.get(key)}, and the state was made with {found.get(key)}: {advice}")
