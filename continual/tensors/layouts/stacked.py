"""LoRA on the experts of a base, whichever of the two has them packed: which stack, and which expert, each pair of
factors is of.

An adapter's file says neither which parameter of a module a pair adapts nor which axis it takes for the input. Both
follow from the shapes of the base's tensors, and where two answers fit, from the version of PEFT that wrote it. Where
that does not decide it either, the adapter is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import shown
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.pieces import Piece
from continual.tensors.adapters.pieces.low_rank import Factors
from continual.tensors.adapters.pieces.stacks import FactorPair, Gathered, Portion, StackFactors, Wrapped
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.layouts.repacking import DOWN, EXPERTS, FUSED, TRIPLES, UP, by_input, one_of
from continual.tensors.layouts.slices import Slice, WithSlices
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.renaming import canonical, family_of

_TURNED = frozenset(("qwen3_vl_moe", "qwen3_vl_moe_text"))
"""`model_type`s whose class has the experts the other way round than their files in transformers 5, and not in 4."""
_MARKED = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
"""`model_type`s whose class says in transformers 5 that its experts are in × out, and says nothing in 4."""


class Settled(NamedTuple):
    """An adapter as the base has its experts, and what of the base's lies otherwise in it, as (base's, adapter's)."""

    adapter: Adapter
    said: tuple[tuple[str, str], ...] = ()


class _Param(NamedTuple):
    """A parameter of a module. `parts`: where the base has its experts one by one, the roles that it is packed from,
    with the rows of each."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...] = ()


class _Fit(NamedTuple):
    """Which parameter each pair is of, and whether its experts are in × out."""

    params: tuple[str, ...]
    by_input: bool


@dataclass(frozen=True, slots=True)
class _Cut(Factors):
    """The factors of one expert, cut out of those of a stack, which take `held` bytes."""

    held: int = 0

    def workspace(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """As the protocol says."""
        return self.held


def settled(base: BaseModel, model: Adapter) -> Settled:
    """The adapter with a piece for each tensor of the base that it changes: its pairs for packed experts given to the
    stacks that they are of, or to their experts where the base has them one by one; and its pieces for single experts
    put together where the base has them packed.

    Raises Refuse: `adapter-target` where the base has no such parameter, `shape` where the factors fit none,
    `adapter-kind` where it is not certain what they mean.
    """
    wrapped = [piece for piece in model.pieces.values() if isinstance(piece, Wrapped)]
    single = any(one_of(name) for name in model.pieces)
    if not wrapped and not single:
        return Settled(model)
    shelf = _Shelf(base)
    pieces = {name: piece for name, piece in model.pieces.items() if not isinstance(piece, Wrapped)}
    slices: dict[str, Slice] = {}
    said: set[tuple[str, str]] = set()
    for piece, params, answer in _answers(base, model, wrapped, shelf):
        if answer is None:
            assert not isinstance(piece.plain, Refuse)
            pieces.update(piece.plain)
            continue
        for name, pair in zip(answer.params, piece.pairs, strict=True):
            made = _of_stack(piece, pair, (name, params[name]), answer.by_input, slices)
            if twice := next((key for key in made if key in pieces), None):
                raise Refuse("adapter-kind", f"{model.place}: has factors of {twice} twice: keep one of the two")
            pieces.update(made)
            said.update((_said(roles), f"{EXPERTS}.{name}") for roles in [params[name].parts] if roles)
    for name, gathered in _gathered(base, model, shelf).items():
        for share in gathered[1]:
            del pieces[share]
        pieces[name] = gathered[0]
        said.add((name.partition(f"{EXPERTS}.")[1] + name.rpartition(".")[2], f"{EXPERTS}.*"))
    weights = WithSlices(model.weights, slices) if slices else model.weights
    return Settled(model.with_pieces(pieces, weights), tuple(sorted(said)))


def _said(parts: Sequence[tuple[str, int, int]]) -> str:
    return " + ".join(f"{EXPERTS}.*.{role}.weight" for role, _, _ in parts)


class _Shelf:
    """Finds parameters of the base by the adapter's name for the module: by the same name, by the same canonical one,
    or by what stands from the layer's number on, where that is said once."""

    def __init__(self, base: BaseModel) -> None:
        self._family = family_of(base.checkpoint.config)
        self._tensors = base.checkpoint.tensors
        self._short: dict[str, list[TensorInfo]] = {}
        self._apart: dict[str, dict[str, dict[int, list[TensorInfo]]]] = {}
        for name, info in self._tensors.items():
            for key in self._keys(name):
                self._short.setdefault(key, []).append(info)
            if one := one_of(name):
                for key in self._keys(one.head):
                    roles = self._apart.setdefault(key, {}).setdefault(one.role, {})
                    roles.setdefault(one.number, []).append(info)

    def _keys(self, name: str) -> tuple[str, ...]:
        short = canonical(name, self._family)
        parts = short.split(".")
        at = next((at for at, part in enumerate(parts) if at and part.isdecimal()), 0)
        return (short, f"*.{'.'.join(parts[at - 1 :])}") if at else (short,)

    def tensor(self, name: str) -> TensorInfo | None:
        """The base's tensor of this name."""
        if name in self._tensors:
            return self._tensors[name]
        found = next((self._short[key] for key in self._keys(name) if key in self._short), [])
        return found[0] if len(found) == 1 else None

    def find(self, module: str, param: str) -> _Param | None:
        """A parameter of a module, as the base has it or as it would be packed from the base's experts."""
        info = self.tensor(f"{module}.{param}")
        if info is not None:
            return _Param(info.shape) if len(info.shape) in (2, 3) else None
        roles = next((self._apart[key] for key in self._keys(module) if key in self._apart), {})
        for gate, up, down in TRIPLES:
            parts = {FUSED: (gate, up), UP: (up,), DOWN: (down,)}.get(param, ())
            if parts and all(part in roles for part in parts):
                return _packed([roles[part] for part in parts], parts)
        return None


def _packed(numbered: Sequence[Mapping[int, Sequence[TensorInfo]]], roles: Sequence[str]) -> _Param | None:
    """The stack that experts would be packed into; None where they do not fit together, or a name means two."""
    count = len(numbered[0])
    every = [info for infos in numbered for many in infos.values() for info in many]
    shapes = {info.shape for info in every}
    whole = all({*infos} == {*range(count)} for infos in numbered) and len(every) == count * len(roles)
    if not whole or len(shapes) != 1 or len(every[0].shape) != 2:
        return None
    rows, columns = every[0].shape
    parts = tuple((role, at * rows, (at + 1) * rows) for at, role in enumerate(roles))
    return _Param((count, rows * len(roles), columns), parts)


def _answers(
    base: BaseModel, model: Adapter, wrapped: Sequence[Wrapped], shelf: _Shelf
) -> Iterator[tuple[Wrapped, dict[str, _Param], _Fit | None]]:
    """Of each module the parameters that may be meant, and which are; None where it is a linear layer."""
    open_: list[tuple[Wrapped, dict[str, _Param], list[_Fit]]] = []
    for piece in wrapped:
        params = {name: found for name in piece.params if (found := shelf.find(piece.module, name)) is not None}
        if not params:
            linear = shelf.tensor(f"{piece.module}.weight")
            if isinstance(piece.plain, Refuse) and linear is not None:
                raise piece.plain
            if isinstance(piece.plain, Refuse) or not piece.plain:
                raise _no_parameter(model, piece)
            yield piece, params, None
            continue
        answers = _fitting(piece, params)
        if not answers:
            raise _unfit(model, piece, params)
        open_.append((piece, params, answers))
    stacks = [one for one in open_ if any(len(param.shape) == 3 for param in one[1].values())]
    sure = {answers[0].by_input for _, _, answers in stacks if len(answers) == 1}
    turned = sure.pop() if len(sure) == 1 else None if sure else _as_written(model, base.checkpoint.config)
    for piece, params, answers in open_:
        left = [one for one in answers if one.by_input == turned] if len(answers) > 1 else answers
        if len(left) != 1:
            raise _uncertain(model, piece, params)
        yield piece, params, left[0]


def _fitting(piece: Wrapped, params: Mapping[str, _Param]) -> list[_Fit]:
    """All answers that the shapes allow. Axes of one module are taken in one way."""
    found = []
    for names in itertools.permutations(params, len(piece.pairs)):
        each = [
            _axes(pair, piece.params[name][0], params[name].shape)
            for pair, name in zip(piece.pairs, names, strict=True)
        ]
        stacked = any(len(params[name].shape) == 3 for name in names)
        found += [_Fit(names, turned) for turned in (False, True)[: 1 + stacked] if all(turned in one for one in each)]
    return found


def _axes(pair: FactorPair, rank: int, shape: tuple[int, ...]) -> frozenset[bool]:
    """Whether A's columns can be the first axis of an expert (True), the last (False), or both. PEFT takes a 2-D
    parameter, and a stack of one expert, for a linear layer's weight."""
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return frozenset()
    experts, first, last = shape if len(shape) == 3 else (1, *shape)
    if pair.a.shape[0] != experts * rank or pair.b.shape[1] != experts * rank:
        return frozenset()
    sides = pair.a.shape[1], pair.b.shape[0]
    either = len(shape) == 2
    return frozenset(
        turned
        for turned in (False, True)
        if (sides == (last, first) if either or not turned else sides == (first, last) and experts > 1)
    )


def _as_written(model: Adapter, config: Mapping[str, object]) -> bool | None:
    """Whether the version of PEFT that wrote the adapter took the first axis of an expert, as the base's files have it,
    for the input; None where that is not certain.

    Before 0.19 it always did. 0.19.0 took the last where the class says that its experts are in × out; later versions
    where it does not say so.
    """
    version = model.config.body.get("peft_version")
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    inner = config.get("text_config")
    types = {config.get("model_type"), inner.get("model_type") if isinstance(inner, dict) else None}
    if match is None or types & _TURNED:
        return None
    release = tuple(map(int, match.groups()))
    if release < (0, 19, 0):
        return True
    return None if types & _MARKED else release == (0, 19, 0)


def _of_stack(
    piece: Wrapped, pair: FactorPair, param: tuple[str, _Param], turned: bool, slices: dict[str, Slice]
) -> dict[str, Piece]:
    """What a pair is added to, by the adapter's names; slices of it go to `slices`."""
    name, (shape, parts) = param
    rank, scale = piece.params[name]
    if len(shape) == 2:
        return {f"{piece.module}.{name}": Factors(piece.where, pair.a, pair.b, rank, scale)}
    if not parts:
        return {f"{piece.module}.{name}": StackFactors(piece.where, pair, shape[0], rank, scale, turned)}
    found: dict[str, Piece] = {}
    held = pair.a.nbytes + pair.b.nbytes
    # B·A of a linear layer: its B has the rows. Where A's columns are the rows, the two change places
    inner, outer = (pair.b, pair.a) if turned else (pair.a, pair.b)
    columns = shape[2]
    for number, (role, start, stop) in itertools.product(range(shape[0]), parts):
        a = Slice(inner, inner is pair.b, number, shape[0], rank, 0, columns, upright=False)
        b = Slice(outer, outer is pair.b, number, shape[0], rank, start, stop, upright=True)
        slices |= {a.info.name: a, b.info.name: b}
        key = f"{piece.module}.{number}.{role}.weight"
        found[key] = _Cut(piece.where, a.info, b.info, rank, scale, held=held)
    return found


def _gathered(base: BaseModel, model: Adapter, shelf: _Shelf) -> dict[str, tuple[Gathered, list[str]]]:
    """What is added to the base's stacks by pieces for single experts, and the names of these pieces."""
    found: dict[str, list[tuple[Portion, str]]] = {}
    for name, piece in model.pieces.items():
        one = one_of(name)
        if one is None or isinstance(piece, Wrapped) or shelf.tensor(name) is not None:
            continue
        for gate, up, down in TRIPLES:
            if one.role not in (gate, up, down):
                continue
            fused = FUSED if one.role != down and shelf.tensor(f"{one.head}.{FUSED}") else None
            packed = fused or {up: UP, down: DOWN}.get(one.role)
            info = shelf.tensor(f"{one.head}.{packed}") if packed else None
            if info is None or len(info.shape) != 3:
                continue
            _check_one(base, model, name, (one.number, info))
            half = info.shape[1] // 2
            rows = (0, info.shape[1]) if not fused else (0, half) if one.role == gate else (half, info.shape[1])
            found.setdefault(f"{one.head}.{packed}", []).append((Portion(one.number, *rows, piece), name))
            break
    return {
        stack: (Gathered(str(model.place), tuple(share for share, _ in shares)), [name for _, name in shares])
        for stack, many in found.items()
        for shares in [sorted(many, key=lambda one: one[0][:3])]
    }


def _check_one(base: BaseModel, model: Adapter, name: str, of: tuple[int, TensorInfo]) -> None:
    """Raises Refuse for a piece of a single expert that the base's stack has no place for."""
    number, info = of
    if by_input(base.checkpoint.config):
        raise Refuse(
            "adapter-target",
            f"{model.place}: adapts {name}, and the base packs its experts into {info.name} as in × out: merge the "
            "adapter into its base, load that with its class, and publish it as the base is saved",
        )
    if number >= info.shape[0]:
        raise Refuse(
            "adapter-target", f"{model.place}: adapts {name}, and {info.name} of the base has {info.shape[0]} experts"
        )


def _no_parameter(model: Adapter, piece: Wrapped) -> Refuse:
    return Refuse(
        "adapter-target",
        f"{model.place}: adapts {len(piece.pairs)} of {', '.join(piece.params)} in {piece.module}, which the base does "
        "not have: an adapter of another base",
    )


def _unfit(model: Adapter, piece: Wrapped, params: Mapping[str, _Param]) -> Refuse:
    pairs = " and ".join(f"{list(pair.a.shape)} × {list(pair.b.shape)}" for pair in piece.pairs)
    there = ", ".join(f"{name} {list(param.shape)} (rank {piece.params[name][0]})" for name, param in params.items())
    return Refuse(
        "shape",
        f"{model.place}: the factors of {piece.module}, {pairs}, fit none of its parameters {there}: an adapter of "
        "another base, or with other ranks than its configuration says",
    )


def _uncertain(model: Adapter, piece: Wrapped, params: Mapping[str, _Param]) -> Refuse:
    there = ", ".join(f"{name} {list(param.shape)}" for name, param in params.items())
    return Refuse(
        "adapter-kind",
        f"{model.place}: target_parameters: the factors of {piece.module} fit its parameters {there} in more than one "
        f"way, and peft_version = {shown(model.config.body.get('peft_version'))} does not decide which is meant; merge "
        "the adapter into its base and publish that",
    )
