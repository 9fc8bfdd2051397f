"""Dense layers that a family fuses into one tensor and others keep apart: `qkv_proj` against q, k and v, `gate_up_proj`
against gate and up.

Phi-3 is published in Llama's names as well, with its layers cut (Unsloth, mergekit). A fine-tune and its base may be of
either kind. The rows of the parts stand one after the other in the families below; of families that interleave them
nothing is cut. All parts have to be there, so that each of the two layouts follows from the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.pieces import Piece
from continual.tensors.adapters.pieces.stacks import Gathered, Portion, Wrapped
from continual.tensors.adapters.pieces.trained import RowsOf
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.layouts.repacking import Repacked
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.renaming import canonical, family_of

FUSIONS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""A fused layer and its parts, in the order of their rows."""
_FLAT: Mapping[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "gate_up_proj"),
    "glm": ("gate_up_proj",),
    "glm4": ("gate_up_proj",),
    "glm4v": ("gate_up_proj",),
    "glm4v_text": ("gate_up_proj",),
    "baichuan": ("W_pack",),
}
"""`model_type`s and the layers that they fuse part by part."""
_APART = ("llama", "mistral")
"""`model_type`s as which models of these families are rewritten: what an adapter calls by the name of a fused layer has
their order there."""
_ENDS = ("weight", "bias")
_PARTS = frozenset(part for parts in FUSIONS.values() for part in parts)


class _DenseName(NamedTuple):
    """What the name of a layer's tensor says: `….self_attn`, `qkv_proj`, `weight`."""

    head: str
    part: str
    end: str


def dense_in_layout_of(base: BaseModel, model: Checkpoint) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
    """The candidate, its layers fused or apart as they are in the base, and what of the base's lies otherwise in it, as
    (base's, candidate's). It shares the files of `model`.

    Raises Refuse: `missing` naming a part that is not there, `dtype` or `shape` where parts do not fit together.
    """
    fused, apart = _flat(base.checkpoint.config), _flat(model.config)
    if fused:
        return _joined(base, model, fused)
    return _cut(base, model, apart) if apart else (model, ())


def _flat(config: Mapping[str, object]) -> frozenset[str]:
    """The layers that a model of this configuration fuses part by part."""
    inner = config.get("text_config")
    families = (family_of(config), family_of(inner) if isinstance(inner, dict) else "")
    return frozenset(name for family in families for name in _FLAT.get(family, ()))


def _layers(tensors: Mapping[str, TensorInfo], wanted: frozenset[str]) -> Iterator[tuple[_DenseName, TensorInfo]]:
    for name, info in tensors.items():
        if (layer := _layer(name)) is not None and layer.part in wanted:
            yield layer, info


def _layer(name: str) -> _DenseName | None:
    parts = name.rsplit(".", 2)
    return _DenseName(*parts) if len(parts) == 3 and parts[2] in _ENDS else None


def _joined(
    base: BaseModel, model: Checkpoint, fused: frozenset[str]
) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
    """Parts of the candidate, put together as the base fuses them."""
    family = family_of(base.checkpoint.config)
    wanted = {
        (canonical(layer.head, family), part, layer.end): (layer.part, info)
        for layer, info in _layers(base.checkpoint.tensors, fused)
        for part in FUSIONS[layer.part]
    }
    found: dict[tuple[str, str, str], dict[str, TensorInfo]] = {}
    whole: dict[tuple[str, str, str], TensorInfo] = {}
    for layer, info in _layers(model.tensors, _PARTS) if wanted else ():
        if there := wanted.get((canonical(layer.head, family), layer.part, layer.end)):
            key = (layer.head, there[0], layer.end)
            found.setdefault(key, {})[layer.part] = info
            whole[key] = there[1]
    if not found:
        return model, ()
    tensors, pieces = dict(model.tensors), {}
    said: set[tuple[str, str]] = set()
    for key, parts in found.items():
        head, into, end = key
        name = f"{head}.{into}.{end}"
        listed = _checked(model, parts, (name, whole[key]))
        for info in listed:
            del tensors[info.name]
        first = listed[0]
        shape = (sum(info.shape[0] for info in listed), *first.shape[1:])
        nbytes = sum(info.nbytes for info in listed)
        tensors[name] = TensorInfo(name, first.dtype, shape, first.file, first.offset, nbytes)
        pieces[name] = listed
        said.add((into, " + ".join(FUSIONS[into])))
    return Repacked(model, tensors, pieces), tuple(sorted(said))


def _checked(model: Checkpoint, parts: Mapping[str, TensorInfo], of: tuple[str, TensorInfo]) -> list[TensorInfo]:
    """The parts of a fused tensor in order. Raises Refuse."""
    name, ours = of
    names = next(FUSIONS[layer.part] for layer in [_layer(name)] if layer is not None)
    if name in model.tensors:
        raise Refuse("prefix", f"{model.place}: has {name}, and {', '.join(parts)} as well: keep one of the two")
    if lost := [part for part in names if part not in parts]:
        there = next(iter(parts.values())).name
        raise Refuse(
            "missing",
            f"{model.place}: has {there} and no {lost[0]} beside it: the base fuses {', '.join(names)} into one "
            "tensor, and all have to be there",
        )
    listed = [parts[part] for part in names]
    shapes = ", ".join(f"{info.name} {info.dtype} {list(info.shape)}" for info in listed)
    if len({info.dtype for info in listed}) > 1:
        raise Refuse("dtype", f"{model.place}: {shapes} differ in dtype, and the base fuses them")
    rows = sum(info.shape[0] if info.shape else 0 for info in listed)
    if (rows, {info.shape[1:] for info in listed}) != (ours.shape[0], {ours.shape[1:]}) or (
        listed[1].shape != listed[-1].shape
    ):
        raise Refuse(
            "shape",
            f"{model.place}: {shapes}; the base has them as {ours.name} {list(ours.shape)}: not a fine-tune of this "
            "base",
        )
    return listed


def _cut(base: BaseModel, model: Checkpoint, fused: frozenset[str]) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
    """Fused tensors of the candidate, cut into the parts that the base has."""
    family = family_of(base.checkpoint.config)
    ours = {
        (canonical(layer.head, family), layer.part, layer.end): info
        for layer, info in _layers(base.checkpoint.tensors, _PARTS)
    }
    tensors = dict(model.tensors)
    said: set[tuple[str, str]] = set()
    for layer, info in _layers(model.tensors, fused):
        names = FUSIONS[layer.part]
        parts = [ours.get((canonical(layer.head, family), part, layer.end)) for part in names]
        there = [part for part in parts if part is not None]
        if len(there) < len(names):
            continue
        rows = sum(part.shape[0] for part in there)
        if info.shape[:1] != (rows,) or {part.shape[1:] for part in there} != {info.shape[1:]}:
            listed = ", ".join(f"{part.name} {list(part.shape)}" for part in there)
            raise Refuse(
                "shape",
                f"{model.place}: {info.name} has shape {list(info.shape)}, and the base has {listed} in its place: not "
                "a fine-tune of this base",
            )
        del tensors[info.name]
        at = 0
        for part, our in zip(names, there, strict=True):
            name = f"{layer.head}.{part}.{layer.end}"
            nbytes = info.nbytes // rows * our.shape[0]
            tensors[name] = TensorInfo(name, info.dtype, our.shape, info.file, info.offset + at, nbytes)
            at += nbytes
        said.add((" + ".join(names), layer.part))
    return (Repacked(model, tensors, {}), tuple(sorted(said))) if said else (model, ())


def pieces_in_layout_of(base: BaseModel, model: Adapter) -> tuple[Adapter, tuple[tuple[str, str], ...]]:
    """The same of an adapter: its pieces for parts are put together, or its pieces for fused layers are cut.

    Raises Refuse: `shape` where the base's configuration and its fused tensor do not agree, `adapter-kind` where a
    piece cannot be cut.
    """
    config = base.checkpoint.config
    family = family_of(config)
    fused = _flat(config)
    cut = frozenset(FUSIONS) if not fused and family in _APART else frozenset[str]()
    wanted = _PARTS if fused else cut
    mine = [(name, layer) for name in model.pieces if (layer := _layer(name)) is not None and layer.part in wanted]
    if not mine:
        return model, ()
    ours: dict[tuple[str, str], TensorInfo] = {}
    for layer, info in _layers(base.checkpoint.tensors, fused or _PARTS):
        if layer.end == "weight":
            ours[canonical(layer.head, family), layer.part] = info
    pieces = dict(model.pieces)
    said: set[tuple[str, str]] = set()
    shares: dict[str, list[Portion]] = {}
    for name, layer in mine:
        piece, head = pieces[name], canonical(layer.head, family)
        if layer.end != "weight" or isinstance(piece, Wrapped):
            continue
        if fused:
            into = next((one for one in fused if layer.part in FUSIONS[one] and (head, one) in ours), None)
            if into is not None and (head, layer.part) not in ours:
                rows = _rows(model, config, into, ours[head, into])
                del pieces[name]
                shares.setdefault(f"{layer.head}.{into}.weight", []).append(Portion(0, *rows[layer.part], piece))
                said.add((into, " + ".join(FUSIONS[into])))
            continue
        parts = [ours.get((head, part)) for part in FUSIONS[layer.part]]
        there = [part for part in parts if part is not None]
        if len(there) == len(parts):
            del pieces[name]
            pieces.update(_pieces_of(model, piece, layer, there))
            said.add((" + ".join(FUSIONS[layer.part]), layer.part))
    for name, many in shares.items():
        pieces[name] = Gathered(str(model.place), tuple(sorted(many, key=lambda share: share.start)))
    return (model.with_pieces(pieces, model.weights), tuple(sorted(said))) if said else (model, ())


def _pieces_of(model: Adapter, piece: Piece, layer: _DenseName, parts: list[TensorInfo]) -> dict[str, Piece]:
    """A piece of a fused layer, cut into those of its parts."""
    total = sum(part.shape[0] for part in parts)
    found: dict[str, Piece] = {}
    at = 0
    for part, info in zip(FUSIONS[layer.part], parts, strict=True):
        rows = ((at, at + info.shape[0]),)
        found[f"{layer.head}.{part}.weight"] = RowsOf.of(str(model.place), piece, rows, total)
        at += info.shape[0]
    return found


def _rows(model: Adapter, config: Mapping[str, object], fused: str, info: TensorInfo) -> dict[str, tuple[int, int]]:
    """The rows of each part in a fused tensor of the base. Raises Refuse (`shape`) where its configuration says other
    ones."""
    names, rows = FUSIONS[fused], info.shape[0]
    sizes = [rows // 2] * 2
    if len(names) == 3:
        heads, groups, hidden, size = (
            config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
        )
        queries = heads if isinstance(heads, int) else 0
        keys = groups if isinstance(groups, int) else queries
        each = size if isinstance(size, int) else hidden // queries if isinstance(hidden, int) and queries else 0
        sizes = [queries * each, keys * each, keys * each]
    if sum(sizes) != rows:
        raise Refuse(
            "shape",
            f"{model.place}: adapts parts of {info.name}, which has {rows} rows in the base, and by the base's "
            f"config.json (heads and their size) {' + '.join(names)} take {sum(sizes)}: correct that file",
        )
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return {name: (start, start + size) for name, start, size in zip(names, starts, sizes, strict=True)}
