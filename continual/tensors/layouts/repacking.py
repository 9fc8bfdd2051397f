"""Experts packed into one tensor, and one by one: the same weights in two layouts.

transformers 5 keeps the experts of a layer in `experts.gate_up_proj` and `experts.down_proj`; transformers 4, and most
files, have `experts.0.gate_proj.weight` and its like. A candidate is read in the layout of its base: what lies apart
there is read as one tensor, expert by expert, gate before up; what is packed is read as its parts. All experts have to
be there. Only whole runs of bytes are put together: where a family packs its experts as in × out, nothing is turned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from continual.errors import Refuse
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.names.kinds import BaseModel

EXPERTS = "experts"
FUSED, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
TRIPLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
"""What gate, up and down are called where experts stand one by one."""
BY_INPUT = frozenset(
    ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "aria", "aria_text", "dbrx")
)
"""`model_type`s whose files have packed experts as in × out; all others have them as out × in, as linear layers are."""
_MOST = 1 << 16
"""Experts of a layer."""


class One(NamedTuple):
    """The name of a weight of one expert: what stands before its number (`….experts`), the number, and its role."""

    head: str
    number: int
    role: str


def one_of(name: str) -> One | None:
    """What `….experts.N.ROLE.weight` says; None for any other name."""
    parts = name.rsplit(".", 3)
    if len(parts) != 4 or parts[3] != "weight" or not (parts[0] == EXPERTS or parts[0].endswith(f".{EXPERTS}")):
        return None
    number = parts[1]
    plain = number.isascii() and number.isdigit() and len(number) <= 6 and str(int(number)) == number
    return One(parts[0], int(number), parts[2]) if plain and int(number) < _MOST else None


def packed_of(info: TensorInfo) -> tuple[str, str] | None:
    """The head and the role of a packed tensor (`….experts.gate_up_proj`); None for any other."""
    head, _, role = info.name.rpartition(".")
    named = role in (FUSED, UP, DOWN) and (head == EXPERTS or head.endswith(f".{EXPERTS}"))
    return (head, role) if named and len(info.shape) == 3 else None


def by_input(config: Mapping[str, object]) -> bool:
    """Whether the files of this family have packed experts as in × out."""
    inner = config.get("text_config")
    types = [config.get("model_type"), inner.get("model_type") if isinstance(inner, dict) else None]
    return any(kind in BY_INPUT for kind in types)


class Repacked(Checkpoint):
    """A checkpoint some of whose tensors are put together from others, which have to be of one dtype: `pieces` has, by
    name, the tensors that stand one after the other in it. It shares the files of `model`, which is to be closed."""

    def __init__(
        self, model: Checkpoint, tensors: Mapping[str, TensorInfo], pieces: Mapping[str, Sequence[TensorInfo]]
    ) -> None:
        before: Mapping[str, Sequence[TensorInfo]] = model._pieces if isinstance(model, Repacked) else {}
        self.__dict__.update(model.__dict__)
        self.tensors = tensors
        self._pieces: Mapping[str, Sequence[TensorInfo]] = {**before, **pieces}

    def read_part(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """As `Checkpoint.read_part`."""
        if info.name not in self._pieces:
            super().read_part(info, start, into)
            return
        for piece in self._pieces[info.name]:
            if start < piece.nbytes and into:
                part = into[: piece.nbytes - start]
                super().read_part(piece, start, part)
                into, start = into[len(part) :], 0
            else:
                start -= piece.nbytes
            if not into:
                return

    def extents(self, infos: Sequence[TensorInfo]) -> list[tuple[int, int, int]]:
        """As `Checkpoint.extents`."""
        return super().extents([piece for info in infos for piece in self._pieces.get(info.name, (info,))])

    def prefetch(self, info: TensorInfo) -> None:
        """As `Checkpoint.prefetch`."""
        for piece in self._pieces.get(info.name, (info,)):
            super().prefetch(piece)


def repacked(base: BaseModel, model: Checkpoint) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
    """The candidate, its experts packed or one by one as they are in the base, and what of the base's tensors lies
    otherwise in it, as (base's, candidate's), `*` for the number of an expert.

    Raises Refuse: `missing` naming an expert that is not there, `dtype` or `shape` where experts of a layer differ,
    `prefix` where a weight is there in both layouts.
    """
    if isinstance(model, Repacked):
        return model, ()
    ours = base.checkpoint.tensors.values()
    packed = [(info, found) for info in ours if (found := packed_of(info))]
    if packed:
        apart = [(info, one) for info in model.tensors.values() if (one := one_of(info.name))]
        return _Packing(base, model, packed, apart).made() if apart else (model, ())
    single = [one for info in ours if (one := one_of(info.name))]
    theirs = [(info, found) for info in model.tensors.values() if (found := packed_of(info))] if single else []
    return _taken_apart(base, model, single, theirs) if theirs else (model, ())


class _Packing:
    """Puts the experts of `apart` together as the base packs its own."""

    def __init__(
        self,
        base: BaseModel,
        model: Checkpoint,
        packed: Sequence[tuple[TensorInfo, tuple[str, str]]],
        apart: Sequence[tuple[TensorInfo, One]],
    ) -> None:
        self._model = model
        _check_turned(base, model, apart[0][0].name)
        self._fused = any(role == FUSED for _, (_, role) in packed)
        counts = {info.shape[0] for info, _ in packed}
        self._count = counts.pop() if len(counts) == 1 else 0
        self._tensors = dict(model.tensors)
        self._pieces: dict[str, list[TensorInfo]] = {}
        self._heads: dict[str, dict[str, dict[int, TensorInfo]]] = {}
        for info, one in apart:
            self._heads.setdefault(one.head, {}).setdefault(one.role, {})[one.number] = info

    def made(self) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
        """The checkpoint, and what was put together."""
        said: set[tuple[str, str]] = set()
        for head, roles in self._heads.items():
            for role, parts in self._wanted(roles):
                self._put(f"{head}.{role}", head, roles, parts)
                said.add((f"{EXPERTS}.{role}", " + ".join(f"{EXPERTS}.*.{part}.weight" for part in parts)))
        if not said:
            return self._model, ()
        return Repacked(self._model, self._tensors, self._pieces), tuple(sorted(said))

    def _wanted(self, roles: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for gate, up, down in TRIPLES:
            first = (FUSED, (gate, up)) if self._fused else (UP, (up,))
            for role, parts in (first, (DOWN, (down,))):
                if any(part in roles for part in parts):
                    yield role, parts

    def _put(self, name: str, head: str, roles: Mapping[str, Mapping[int, TensorInfo]], parts: tuple[str, ...]) -> None:
        place = self._model.place
        if name in self._tensors:
            raise Refuse("prefix", f"{place}: has {name}, and its experts one by one as well: keep one of the two")
        most = max(number for part in parts for number in roles.get(part, {}))
        count = max(self._count, most + 1)
        pieces: list[TensorInfo] = []
        for number in range(count):
            for part in parts:
                found = roles.get(part, {}).get(number)
                if found is None:
                    raise Refuse(
                        "missing",
                        f"{place}: has its experts one by one and lacks {head}.{number}.{part}.weight: the base packs "
                        f"{count} experts into one tensor, and all have to be there",
                    )
                pieces.append(found)
        first = pieces[0]
        for piece in pieces:
            like = roles[one.role][0] if (one := one_of(piece.name)) else first
            if piece.dtype != first.dtype:
                raise Refuse(
                    "dtype",
                    f"{place}: {piece.name} is {piece.dtype} and {first.name} {first.dtype}: the base packs both",
                )
            if len(piece.shape) != 2 or piece.shape != like.shape or piece.shape[1] != first.shape[1]:
                raise Refuse(
                    "shape",
                    f"{place}: {piece.name} has shape {list(piece.shape)} and {first.name} {list(first.shape)}: "
                    "the base packs both",
                )
            del self._tensors[piece.name]
        rows = sum(piece.shape[0] for piece in pieces[: len(parts)])
        shape = (count, rows, first.shape[1])
        nbytes = sum(piece.nbytes for piece in pieces)
        self._tensors[name] = TensorInfo(name, first.dtype, shape, first.file, first.offset, nbytes)
        self._pieces[name] = pieces


def _taken_apart(
    base: BaseModel, model: Checkpoint, single: Sequence[One], theirs: Sequence[tuple[TensorInfo, tuple[str, str]]]
) -> tuple[Checkpoint, tuple[tuple[str, str], ...]]:
    """Each packed tensor of the candidate as its experts, under the names that the base has for their roles."""
    _check_turned(base, model, theirs[0][0].name)
    roles = {one.role for one in single}
    triple = next((triple for triple in TRIPLES if triple[2] in roles or triple[1] in roles), None)
    if triple is None:
        return model, ()
    gate, up, down = triple
    count = 1 + max(one.number for one in single)
    tensors = dict(model.tensors)
    said: set[tuple[str, str]] = set()
    for info, (head, role) in theirs:
        parts = {FUSED: (gate, up), UP: (up,), DOWN: (down,)}[role]
        experts, rows, columns = info.shape
        if experts != count or rows % len(parts):
            raise Refuse(
                "shape",
                f"{model.place}: tensor {info.name} has shape {list(info.shape)}, and the base has {count} experts one "
                "by one: not a fine-tune of this base",
            )
        del tensors[info.name]
        nbytes = info.nbytes // (experts * len(parts))
        for at, (number, part) in enumerate((number, part) for number in range(experts) for part in parts):
            name = f"{head}.{number}.{part}.weight"
            if name in tensors:
                raise Refuse("prefix", f"{model.place}: has {info.name}, and {name} as well: keep one of the two")
            shape = (rows // len(parts), columns)
            tensors[name] = TensorInfo(name, info.dtype, shape, info.file, info.offset + at * nbytes, nbytes)
        said.add((" + ".join(f"{EXPERTS}.*.{part}.weight" for part in parts), f"{EXPERTS}.{role}"))
    return Repacked(model, tensors, {}), tuple(sorted(said))


def _check_turned(base: BaseModel, model: Checkpoint, name: str) -> None:
    """Raises Refuse where the family packs its experts as in × out: they would have to be turned."""
    if by_input(base.checkpoint.config):
        raise Refuse(
            "missing",
            f"{model.place}: {name}: this family packs its experts as in × out, and the base has them in the other of "
            "the two layouts: load the model with its class and save it as the base is saved",
        )
