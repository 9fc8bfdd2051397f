"""Whether a candidate is a fine-tune of this base, and how its tensors map to the base's: from headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.records import Lineage, TensorSpec
from continual.tensors import Adapter, BaseModel, Checkpoint, candidate_name
from continual.tensors.checkpoint import FLOATS
from continual.tensors.kinds import is_vocabulary

_NAMED = 5


@dataclass(frozen=True, slots=True)
class LineagePolicy:
    """`missing`: what a tensor means that the candidate lacks. `vocab`: what to do where the vocabularies have different sizes."""

    missing: Literal["refuse", "unchanged"] = "refuse"
    vocab: Literal["refuse", "common-rows"] = "refuse"


def trace(base: BaseModel, model: Checkpoint | Adapter, policy: LineagePolicy) -> Lineage:
    """How `model` maps to `base`. Raises Refuse: `prefix`, `missing`, `shape`, `dtype`, `adapter-target`."""
    return _adapter(base, model) if isinstance(model, Adapter) else _full(base, model, policy)


def _full(base: BaseModel, model: Checkpoint, policy: LineagePolicy) -> Lineage:
    specs = {spec.name: spec for spec in base.specs if spec.kind != "carried"}
    prefix = find_prefix(specs, model.tensors, str(model.path))
    aliases: dict[str, list[str]] = {}
    for alias, name in base.aliases.items():
        aliases.setdefault(name, []).append(candidate_name(alias, prefix))
    folded: dict[str, str] = {}
    for name in specs:
        found = [n for n in (candidate_name(name, prefix), *aliases.get(name, [])) if n in model.tensors]
        if found:
            folded[name] = found[0]
    missing = tuple(sorted(specs.keys() - folded.keys()))
    if not folded or (missing and policy.missing == "refuse"):
        raise Refuse(
            "missing", f"{model.path}: lacks {_some(missing)} of the base; a fine-tune that left them out can be let in with missing = unchanged"
        )
    narrowed: dict[str, str] = {}
    rows: dict[str, int] = {}
    for name, theirs in folded.items():
        info, spec = model.tensors[theirs], specs[name]
        if info.dtype not in FLOATS:
            raise Refuse("dtype", f"{model.path}: tensor {theirs} is {info.dtype}, the base's is {spec.dtype}: convert it to F32, F16 or BF16")
        if info.shape != spec.shape:
            rows[name] = _common_rows(model, theirs, info.shape, spec, policy)
        if info.dtype not in (spec.dtype, "F32"):
            narrowed[name] = info.dtype
    carried = {candidate_name(spec.name, prefix) for spec in base.specs if spec.kind == "carried"}
    known = {*folded.values(), *carried, *(alias for group in aliases.values() for alias in group)}
    extra = tuple(sorted(name for name in model.tensors if name not in known))
    return Lineage(tuple(sorted(folded)), missing, extra, prefix, narrowed, rows)


def _common_rows(model: Checkpoint, theirs: str, shape: tuple[int, ...], spec: TensorSpec, policy: LineagePolicy) -> int:
    both = f"{model.path}: tensor {theirs} has shape {list(shape)}, the base's has {list(spec.shape)}"
    if shape[1:] != spec.shape[1:] or not shape or not spec.shape or not is_vocabulary(spec.name):
        raise Refuse("shape", f"{both}: not a fine-tune of this base")
    if policy.vocab == "refuse":
        raise Refuse("shape", f"{both}: its vocabulary was resized; vocab = common-rows folds the rows both have")
    return min(shape[0], spec.shape[0])


def _adapter(base: BaseModel, model: Adapter) -> Lineage:
    specs = {spec.name: spec for spec in base.specs if spec.kind != "carried"}
    prefix = find_prefix(specs, [*model.factors, *model.saved], str(model.path), partial=True)
    ours = {candidate_name(name, prefix): name for name in specs}
    ours |= {candidate_name(alias, prefix): name for alias, name in base.aliases.items() if candidate_name(alias, prefix) not in ours}
    unknown = tuple(sorted(weight for weight in model.factors if weight not in ours))
    if unknown:
        raise Refuse("adapter-target", f"{model.path}: adapts {_some(unknown)}, which the base does not have: an adapter of another base")
    for weight in model.factors:
        spec = specs[ours[weight]]
        flat = (spec.shape[0], spec.numel // max(1, spec.shape[0])) if spec.shape else ()
        if model.shape(weight) != flat:
            raise Refuse("shape", f"{model.path}: {weight} has shape {list(model.shape(weight))} as an adapter, the base's has {list(spec.shape)}")
    narrowed = {}
    for weight, name in model.saved.items():
        if weight in ours:
            info, spec = model.weights.tensors[name], specs[ours[weight]]
            if info.shape != spec.shape:
                raise Refuse("shape", f"{model.path}: {weight} has shape {list(info.shape)}, the base's has {list(spec.shape)}")
            if info.dtype not in (spec.dtype, "F32"):
                narrowed[ours[weight]] = info.dtype
    folded = tuple(sorted({ours[w] for w in (*model.factors, *model.saved) if w in ours}))
    extra = tuple(sorted(w for w in model.saved if w not in ours))
    if not folded:
        raise Refuse("adapter-target", f"{model.path}: adapts nothing of this base, only {_some(extra)}")
    return Lineage(folded, tuple(sorted(specs.keys() - set(folded))), extra, prefix, narrowed)


def find_prefix(ours: Collection[str], theirs: Iterable[str], where: str, *, partial: bool = False) -> tuple[str, str]:
    """The one leading part that differs between the base's names and the candidate's, as (base's, candidate's); two empty strings where none does.

    `partial`: the candidate has only some of the base's tensors (an adapter). Raises Refuse if two prefixes would fit equally well.
    """
    theirs = set(theirs)
    counted: Counter[tuple[str, str]] = Counter()
    counted["", ""] = sum(name in theirs for name in ours)
    ends: dict[str, list[str]] = {}
    for name in ours:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    enough = (len(theirs) if partial else len(ours)) / 2
    if counted["", ""] > enough:
        return "", ""
    for name in theirs:
        for own in ends.get(name.rpartition(".")[2], []):
            if name != own and name.endswith("." + own):
                counted["", name[: -len(own)]] += 1
            elif name != own and own.endswith("." + name):
                counted[own[: -len(name)], ""] += 1
    best = counted.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1] > 0:
        raise Refuse("prefix", f"{where}: its names fit the base's with the prefixes {best[0][0]} and {best[1][0]} equally well")
    return best[0][0] if best[0][1] > 0 else ("", "")


def _some(names: Collection[str]) -> str:
    listed = list(names)[:_NAMED]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(listed) + more
