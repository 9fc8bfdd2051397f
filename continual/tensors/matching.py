"""What a candidate says about each tensor of a base: names, one differing prefix, tied names, adapter factors. From
headers only, and no judgement: whether dtypes, shapes and gaps are allowed is for gates/lineage.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from continual.errors import Refuse
from continual.tensors.adapter import Adapter, Factors
from continual.tensors.checkpoint import Checkpoint
from continual.tensors.header import TensorInfo
from continual.tensors.kinds import BaseModel

CONV1D = {
    family: frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
    for family in ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer")
}
"""Modules that store their weight as in × out (transformers' Conv1D), by model type. An adapter's one flag is that of
the layer PEFT met last."""


class Match(NamedTuple):
    """Where a task vector comes from. `full`: the tensor that replaces the base's. `twins`: the same tensor under tied
    names. `factors`: what an adapter adds; `transposed`: the base stores that weight as in × out."""

    full: TensorInfo | None
    twins: tuple[TensorInfo, ...] = ()
    factors: Factors | None = None
    transposed: bool = False


def sources(base: BaseModel, model: Checkpoint | Adapter, prefix: tuple[str, str]) -> tuple[dict[str, Match], set[str]]:
    """The source of each foldable tensor of the base that the candidate has, by the base's name; and the candidate's
    names that were understood.

    Raises Refuse (`tied`) if an adapter adapts two names of one tensor.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in base.aliases.items():
        aliases.setdefault(name, []).append(alias)
    found: dict[str, Match] = {}
    known: set[str] = set()
    for spec in base.specs:
        names = [candidate_name(spec.name, prefix)]
        for alias in sorted(aliases.get(spec.name, [])):
            names += [candidate_name(alias, prefix), alias]
        names = list(dict.fromkeys(names))
        known.update(names)
        if spec.kind == "carried":
            continue
        source = (
            _of_adapter(base, model, spec.name, names) if isinstance(model, Adapter) else _of_checkpoint(model, names)
        )
        if source is not None:
            found[spec.name] = source
    return found, known


def _of_checkpoint(model: Checkpoint, names: list[str]) -> Match | None:
    present = [model.tensors[name] for name in names if name in model.tensors]
    return Match(present[0], tuple(present[1:])) if present else None


def _of_adapter(base: BaseModel, model: Adapter, ours: str, names: list[str]) -> Match | None:
    present = [model.weights.tensors[model.saved[name]] for name in names if name in model.saved]
    adapted = [name for name in names if name in model.factors]
    if len(adapted) > 1:
        raise Refuse("tied", f"{model.place}: adapts {adapted[0]} and {adapted[1]}, which are one tensor in the base")
    if not present and not adapted:
        return None
    factors = model.factors[adapted[0]] if adapted else None
    known = CONV1D.get(str(base.checkpoint.config.get("model_type")))
    transposed = (
        ours.split(".")[-2:-1] != [] and ours.split(".")[-2] in known if known is not None else model.transposed
    )
    return Match(present[0] if present else None, tuple(present[1:]), factors, transposed)


def names_of(model: Checkpoint | Adapter) -> Collection[str]:
    """The names of a candidate's tensors; an adapter's are those of the weights it changes."""
    return {*model.factors, *model.saved} if isinstance(model, Adapter) else model.tensors.keys()


def candidate_name(name: str, prefix: tuple[str, str]) -> str:
    """The candidate's name for the base's tensor `name`, with the leading part that differs exchanged."""
    ours, theirs = prefix
    return theirs + name.removeprefix(ours)


def find_prefix(ours: Collection[str], theirs: Collection[str], where: str) -> tuple[str, str]:
    """The one leading part that is added or missing in the candidate's names, as (base's, candidate's); two empty
    strings where the names agree.

    Raises Refuse (`prefix`) if another prefix, or none, explains at least half as many names as the best does.
    """
    ours, theirs = set(ours), set(theirs)
    same = len(ours & theirs)
    if same == min(len(ours), len(theirs)):
        return "", ""
    counted: Counter[tuple[str, str]] = Counter({("", ""): same})
    long, wide = {len(name) for name in ours}, {len(name) for name in theirs}
    counted.update((head, "") for name in ours for head in _heads(name, theirs, wide))
    counted.update(("", head) for name in theirs for head in _heads(name, ours, long))
    (best, most), *others = counted.most_common(2)
    if others and 2 * others[0][1] >= most > 0:
        raise Refuse(
            "prefix",
            f"{where}: its names fit the base's {_said(best)} ({most} names) "
            f"and {_said(others[0][0])} ({others[0][1]}): ambiguous",
        )
    return best


def _heads(name: str, tails: Collection[str], lengths: Collection[int]) -> Iterator[str]:
    """What stands before those ends of a name that are among `tails`; `lengths` are those of the tails, so that nothing
    is copied for the other ends."""
    at = name.find(".")
    while at >= 0:
        if len(name) - at - 1 in lengths and name[at + 1 :] in tails:
            yield name[: at + 1]
        at = name.find(".", at + 1)


def _said(prefix: tuple[str, str]) -> str:
    ours, theirs = prefix
    return f"with {theirs!r} added" if theirs else f"without {ours!r}" if ours else "as they are"
