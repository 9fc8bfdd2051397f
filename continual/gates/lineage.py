"""Whether a candidate is a fine-tune of this base, and how its tensors map to the base's: from headers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.gates.adapters import check_brought
from continual.gates.contract import AtHeaders, Headers
from continual.gates.kinship import check_name
from continual.gates.tables import check_tied
from continual.gates.vocabulary import check_pieces, corresponding, tables_of
from continual.outside import few
from continual.records import Lineage, TensorSpec
from continual.tensors import Adapter, BaseModel, Checkpoint, Place, TensorInfo
from continual.tensors.checkpoints.buffers import is_buffer, is_computed
from continual.tensors.checkpoints.checkpoint import FLOATS
from continual.tensors.checkpoints.foreign import layout_of
from continual.tensors.layouts.same_layout import in_layout_of, repackings
from continual.tensors.matched.matching import Match, names_of, naming, renamings, sources
from continual.tensors.names.kinds import is_vocabulary
from continual.tensors.names.leftovers import (
    Left,
    in_layer,
    of_an_adapter,
    of_another_depth,
    of_another_size,
    of_another_task,
    same_after_all,
)
from continual.tensors.names.renaming import family_of


@dataclass(frozen=True)
class LineageGate(AtHeaders):
    """Refuses a model whose tensors are not those of the base.

    `missing`: `unchanged` lets a full model leave tensors out, which then count as untouched; not where it has unknown
    tensors that may be the same. Buffers, and heads that its class lacks, may always be missing. `vocab`: `common-
    rows` lets its vocabulary have another size; the rows that both have are folded. `by-token` folds each row into that
    of the same token, by both tokenizers. `extra`: whether a model with weights that the base lacks (a head for a task)
    is let in without them. `carried`: the same of an adapter that changes weights which this state does not fold.
    `lineage`: `shapes` lets an adapter in that names another base. `tied`: `both` takes what an adapter does to one of
    two tied tables for both.
    """

    name = "lineage"
    reasons = (
        "prefix",
        "missing",
        "adapter-kind",
        "adapter-target",
        "dtype",
        "shape",
        "vocab",
        "tied",
        "index",
        "extra",
        "lineage",
    )
    shared = ("missing", "vocab", "lineage", "tied")

    missing: Literal["refuse", "unchanged"] = "refuse"
    vocab: Literal["refuse", "common-rows", "by-token"] = "refuse"
    extra: Literal["leave-out", "refuse"] = "leave-out"
    carried: Literal["refuse", "leave-out"] = "refuse"
    lineage: Literal["name", "shapes"] = "name"
    tied: Literal["refuse", "both", "untie"] = "refuse"

    def judge(self, seen: Headers) -> Headers:
        """Finds how the model maps to the base. Raises Refuse as `trace`, and `lineage` where it names another
        base."""
        if self.lineage == "name":
            check_name(seen)
        return seen._replace(lineage=trace(seen.base, seen.model, self))


def trace(base: BaseModel, model: Checkpoint | Adapter, gate: LineageGate, *, again: bool = False) -> Lineage:
    """How `model` maps to `base`.

    An adapter lacks most of the base by its nature. So what it does not adapt is unchanged, whatever `missing` says.
    `again`: it was let in before, and its vocabulary is not judged anew.
    Raises Refuse: `prefix` if the leading part of the names is ambiguous, `missing`, `adapter-target`, `dtype`,
    `shape`, `vocab`, `tied`.
    """
    specs = {spec.name: spec for spec in base.specs if spec.kind != "carried"}
    changed = repackings(base, model)
    model = in_layout_of(base, model)
    names = naming(base, model, str(model.place))
    found, known = sources(base, model, names)
    if isinstance(model, Adapter):
        extra = check_brought(base, model, names, found, known, gate.carried)
    else:
        extra = _unknown(model, known)
        _check_unlisted(model, found, specs)
        found = {name: source for name, source in found.items() if _is_of_use(specs[name], source)}
        _check_missing(base, model, found, extra, gate)
    other = _other_heads(base, found, specs)
    extra = tuple(sorted({*extra, *other.values()}))
    found = {name: source for name, source in found.items() if name not in other}
    if extra and gate.extra == "refuse":
        raise Refuse(
            "extra",
            f"{model.place}: brings {few(extra)}, which the base lacks and the merge would lose; "
            "gates.lineage.extra = leave-out lets the model in without them",
            by=("extra",),
        )
    missing = tuple(name for name in specs if name not in found)
    full = not isinstance(model, Adapter)
    lacking = tuple(n for n in missing if full and n not in other and not is_buffer(n, specs[n].shape))
    narrowed: dict[str, str] = {}
    for name, source in found.items():
        spec = specs[name]
        if isinstance(model, Adapter) and gate.tied != "both":
            check_tied(base, model, spec, source)
        if source.full is not None:
            _check_dtype(model.place, source.full, source, spec)
            if source.full.dtype not in (spec.dtype, "F32"):  # F16 and BF16 cannot hold each other's values either
                narrowed[name] = source.full.dtype
    tables = tables_of(model, specs, found)
    rows, tokens = corresponding(base, model, tables, gate.vocab, again=again)
    if isinstance(model, Adapter):
        check_pieces(model, found, tokens)
    renamed = renamings(base, model, names)
    found_names = tuple(sorted(found))
    return Lineage(
        found_names, missing, extra, names.prefix, narrowed, rows, renamed, changed, lacking=lacking, tokens=tokens
    )


def unlisted_of(model: Checkpoint | Adapter) -> frozenset[str]:
    """Tensors that lie in a shard of the model and not in its index: they stay out, and are said to."""
    return frozenset(() if isinstance(model, Adapter) else model.unlisted)


def _check_unlisted(model: Checkpoint, found: Collection[str], specs: Collection[str]) -> None:
    """Raises Refuse (`index`) where a tensor that the base has is in a shard and not in the index."""
    lost = sorted(name for name in unlisted_of(model) if name in specs and name not in found)
    if lost:
        raise Refuse(
            "index",
            f"{model.place}: {few(lost)} of the base lie in its shards, and its index does not name them: write the "
            "index anew (load the model and call save_pretrained)",
        )


def _unknown(model: Checkpoint, known: Collection[str]) -> tuple[str, ...]:
    """The candidate's names that no tensor of the base explains. Buffers are not counted: a class makes them anew."""
    unknown = sorted({name for name in names_of(model) if name not in known} | unlisted_of(model))
    return tuple(n for n in unknown if n not in model.tensors or not is_buffer(n, model.tensors[n].shape))


def _is_of_use(spec: TensorSpec, source: Match) -> bool:
    """Whether a tensor can be folded, or has to be: a buffer of another length or type says nothing about training."""
    if source.full is None or not is_buffer(spec.name, spec.shape):
        return True
    return source.full.dtype in FLOATS and source.full.shape == spec.shape


def _check_missing(
    base: BaseModel, model: Checkpoint, found: Collection[str], extra: Collection[str], gate: LineageGate
) -> None:
    """A tensor that the candidate lacks is untouched only where no unknown one of the candidate can be the same."""
    if left := of_an_adapter(extra):
        raise Refuse(
            "adapter-kind",
            f"{model.place}: tensor {left} is a part of an adapter that was not merged; merge it into its base "
            "(merge_and_unload) and publish that, or publish the adapter alone",
        )
    specs = [s for s in base.specs if s.kind != "carried" and not is_buffer(s.name, s.shape)]
    missing = [s for s in specs if s.name not in found]
    _check_layout(base, model, [s.name for s in missing], extra)
    family = family_of(base.checkpoint.config)
    fresh = of_another_task(missing, base.checkpoint.config, model.config, family)
    if len(missing) == len(specs):
        raise Refuse(
            "missing",
            f"{model.place}: has none of the base's tensors ({few([s.name for s in missing])}); it has "
            f"{few(sorted(model.tensors))}: not a fine-tune of this base",
        )
    unknown = [Left(name, model.tensors[name].shape) for name in extra if name in model.tensors]
    lefts = [Left(s.name, s.shape) for s in missing if s.name not in fresh or is_vocabulary(s.name)]
    pair = same_after_all(lefts, unknown, family)
    if pair is not None:
        ours, theirs = pair
        raise Refuse(
            "missing",
            f"{model.place}: lacks {ours.name} {list(ours.shape)} of the base and has {theirs.name} "
            f"{list(theirs.shape)}, which the base lacks: they seem to be the same weights under another name or in "
            f"another layout ({len(missing)} are lacking so); load it with the library that wrote the base, save it "
            "again, and publish that",
        )
    lost = [s.name for s in missing if s.name not in fresh and not is_computed(s.name, family)]
    if lost and gate.missing == "refuse":
        raise Refuse(
            "missing",
            f"{model.place}: lacks {few(lost)} of the base; if the fine-tune left them out "
            "because it did not train them, missing = unchanged lets it in",
            by=("missing",),
        )


def _check_layout(base: BaseModel, model: Checkpoint, missing: Collection[str], extra: Collection[str]) -> None:
    """Raises Refuse (`missing`) for a candidate in a layout that is known and not the base's, and for one that has
    more layers or fewer: those that have the same number are not the same ones."""
    layout = layout_of(extra) if missing else None
    if layout is not None:
        name, what, do = layout
        raise Refuse("missing", f"{model.place}: {name} is of {what}; the base is in another layout: {do}")
    depth = of_another_depth(base.checkpoint.config, model.config)
    family = family_of(base.checkpoint.config)
    if depth is not None and any(in_layer(name, family) for name in (*missing, *extra)):
        raise Refuse(
            "missing",
            f"{model.place}: has {depth[1]} layers and the base {depth[0]}, by config.json: layers were added or taken "
            "out, so that those of one number are not the same: not a fine-tune of this base",
        )


def _other_heads(base: BaseModel, found: Mapping[str, Match], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The heads that the candidate has for another number of classes, as the base's names to the candidate's."""
    whole = {name: source.full for name, source in found.items() if source.full is not None and source.piece is None}
    shapes = {name: info.shape for name, info in whole.items()}
    heads = of_another_size(shapes, specs, family_of(base.checkpoint.config))
    return {name: whole[name].name for name in heads}


def _check_dtype(place: Place, info: TensorInfo, source: Match, spec: TensorSpec) -> None:
    if info.dtype not in FLOATS:
        raise Refuse(
            "dtype",
            f"{place}: tensor {info.name} is {info.dtype}, the base's is {spec.dtype}: convert it to F32, F16 or BF16",
        )
    for twin in source.twins:
        if (twin.dtype, twin.shape) != (info.dtype, info.shape):
            raise Refuse(
                "tied",
                f"{place}: {info.name} and {twin.name} are one tensor in the base, and differ here in dtype or shape: "
                "publish the model as its class saves it (load it, then save_pretrained)",
            )
