"""Whether a candidate is a fine-tune of this base, and how its tensors map to the base's: from headers only."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.records import Lineage, TensorSpec
from continual.tensors import Adapter, BaseModel, Checkpoint, TensorInfo
from continual.tensors.checkpoint import FLOATS
from continual.tensors.kinds import is_vocabulary
from continual.tensors.matching import Source, find_prefix, names_of, sources

_NAMED = 5


@dataclass(frozen=True, slots=True)
class LineagePolicy:
    """`missing`: what a tensor means that the candidate lacks. `vocab`: what to do where the vocabularies have
    different sizes."""

    missing: Literal["refuse", "unchanged"] = "refuse"
    vocab: Literal["refuse", "common-rows"] = "refuse"


def trace(base: BaseModel, model: Checkpoint | Adapter, policy: LineagePolicy) -> Lineage:
    """How `model` maps to `base`.

    Raises Refuse with the reasons `prefix` (ambiguous), `missing`, `adapter-target`, `dtype`, `shape`, `vocab`, `tied`.
    An adapter lacks most of the base by its nature, so what it does not adapt is unchanged whatever the policy says.
    """
    specs = {spec.name: spec for spec in base.specs if spec.kind != "carried"}
    theirs = names_of(model)
    prefix = find_prefix(specs, theirs, str(model.place))
    found, known = sources(base, model, prefix)
    missing = tuple(name for name in specs if name not in found)
    if isinstance(model, Adapter):
        if unmet := sorted(model.factors.keys() - known):
            raise Refuse(
                "adapter-target",
                f"{model.place}: adapts {_some(unmet)}, which the base does not have: an adapter of another base",
            )
        if not found:
            raise Refuse(
                "adapter-target", f"{model.place}: adapts nothing that this base folds, only {_some(sorted(theirs))}"
            )
    elif not found:
        raise Refuse(
            "missing", f"{model.place}: has none of the base's tensors ({_some(missing)}): not a fine-tune of this base"
        )
    elif missing and policy.missing == "refuse":
        raise Refuse(
            "missing",
            f"{model.place}: lacks {_some(missing)} of the base; a fine-tune that left them out can be let in with missing = unchanged",
        )
    narrowed: dict[str, str] = {}
    rows: dict[str, int] = {}
    for name, source in found.items():
        if source.full is not None:
            _full(model, source.full, source, specs[name], policy, narrowed, rows)
        if source.factors is not None:
            assert isinstance(model, Adapter)
            _factors(model, source, specs[name])
    extra = tuple(sorted(name for name in theirs if name not in known))
    return Lineage(tuple(sorted(found)), missing, extra, prefix, narrowed, rows)


def _full(
    model: Checkpoint | Adapter,
    info: TensorInfo,
    source: Source,
    spec: TensorSpec,
    policy: LineagePolicy,
    narrowed: dict[str, str],
    rows: dict[str, int],
) -> None:
    if info.dtype not in FLOATS:
        raise Refuse(
            "dtype",
            f"{model.place}: tensor {info.name} is {info.dtype}, the base's is {spec.dtype}: convert it to F32, F16 or BF16",
        )
    for twin in source.twins:
        if (twin.dtype, twin.shape) != (info.dtype, info.shape):
            raise Refuse(
                "tied",
                f"{model.place}: {info.name} and {twin.name} are one tensor in the base, and differ here in dtype or shape",
            )
    if info.shape != spec.shape:
        both = f"{model.place}: tensor {info.name} has shape {list(info.shape)}, the base's has {list(spec.shape)}"
        if not info.shape or not spec.shape or info.shape[1:] != spec.shape[1:] or not is_vocabulary(spec.name):
            raise Refuse("shape", f"{both}: not a fine-tune of this base")
        if policy.vocab == "refuse":
            raise Refuse("vocab", f"{both}: its vocabulary was resized; vocab = common-rows folds the rows both have")
        rows[spec.name] = min(info.shape[0], spec.shape[0])
    if info.dtype not in (spec.dtype, "F32"):  # F16 and BF16 cannot hold each other's values either
        narrowed[spec.name] = info.dtype


def _factors(model: Adapter, source: Source, spec: TensorSpec) -> None:
    assert source.factors is not None
    shape = model.shape(source.factors, source.transposed)
    if len(spec.shape) < 2 or shape != (spec.shape[0], math.prod(spec.shape[1:])):
        raise Refuse(
            "shape",
            f"{model.place}: the product of {source.factors.b} and {source.factors.a} is {list(shape)}, {spec.name} is {list(spec.shape)}",
        )


def _some(names: Collection[str]) -> str:
    listed = list(names)[:_NAMED]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(listed) + more
