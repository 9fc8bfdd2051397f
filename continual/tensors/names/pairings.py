"""Pairs of matrices of a layer of which only the product counts: queries and keys, values and outputs, the channels of
a feed-forward layer. By the names architectures use, and the heads that their configuration has.

What is not here: parts of a fused layer that families interleave otherwise than head by head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from continual.records import TensorSpec
from continual.tensors.names.conv1d import CONV1D
from continual.tensors.names.renaming import family_of

Config = Mapping[str, object]
PairKind = Literal["query-key", "value-output", "channels"]

_QUERY_KEY = (
    ("q_proj", "k_proj"),
    ("q_lin", "k_lin"),
    ("query", "key"),
    ("to_q", "to_k"),
    ("wq", "wk"),
    ("Attention.q", "Attention.k"),
)
_VALUE_OUTPUT = (
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("v_lin", "out_lin"),
    ("self.value", "output.dense"),
    ("attention.value", "output.dense"),
    ("to_v", "to_out.0"),
    ("wv", "wo"),
    ("Attention.v", "Attention.o"),
)
_FUSED = (
    ("qkv_proj", "o_proj"),
    ("W_pack", "o_proj"),
    ("attn.c_attn", "attn.c_proj"),
    ("Wqkv", "out_proj"),
    ("Wqkv", "Wo"),
    ("attn.qkv", "attn.proj"),
    ("attn.in_proj_weight", "attn.out_proj"),
)
"""Queries, keys and values one after the other, and the outputs."""
_BY_HEAD = (("query_key_value", "dense"),)
"""Of each head its queries, keys and values, and the outputs."""
_INTERLEAVED = ("gpt_neox", "bloom")
_CHANNELS = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("mlp.c_fc", "mlp.c_proj"),
    ("lin1", "lin2"),
    ("intermediate.dense", "output.dense"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi_1", "wo"),
    ("DenseReluDense.wi", "DenseReluDense.wo"),
    ("w3", "w2"),
)
_HALVED = (("gate_up_proj", "down_proj"),)
"""What gates, and behind it what is gated."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_SIZES = ("head_dim", "d_kv", "attention_head_dim")

_LARGEST = 1024
"""Rows of a layer that counts as one head, at most."""


class Side(NamedTuple):
    """Where the heads of one matrix lie: from row `start` on, `step` rows from one to the next; or in columns, where it
    is `across`."""

    name: str
    start: int
    step: int
    across: bool


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two matrices of one layer, as heads of `size` rows (channels: of 1): head h of `first` goes with head
    h // `shared` of `second`. What the layer computes is unchanged where any invertible matrix is put between the two
    of a head."""

    where: str
    kind: PairKind
    first: Side
    second: Side
    heads: int
    shared: int
    size: int

    @property
    def names(self) -> tuple[str, str]:
        return self.first.name, self.second.name


class _Heads(NamedTuple):
    """Of a layer: how many heads of queries and of keys, and the numbers of each."""

    queries: int
    keys: int
    size: int


def pairings(specs: Sequence[TensorSpec], config: Config) -> tuple[Pairing, ...]:
    """The pairs that a base has, in the order of its layers' names. Where its configuration says nothing of heads, a
    layer counts as one head: the sum over all heads is unchanged as well."""
    known = {_module(spec.name): spec for spec in specs if spec.kind == "matrix" and len(spec.shape) == 2}
    finder = _Finder(known, config)
    return tuple(sorted(finder.found(), key=lambda one: (one.where, one.kind)))


class _Finder:
    def __init__(self, known: Mapping[str, TensorSpec], config: Config) -> None:
        self._known = known
        inner = [value for value in config.values() if isinstance(value, dict)]
        self._configs = [config, *inner]
        self._turned = CONV1D.get(family_of(config), frozenset())
        self._interleaved = family_of(config) in _INTERLEAVED

    def found(self) -> Iterator[Pairing]:
        for kind, pairs in (("query-key", _QUERY_KEY), ("value-output", _VALUE_OUTPUT)):
            for where, first, second in self._pairs(pairs):
                yield from self._apart(where, kind, first, second)
        for where, first, second in self._pairs(_FUSED):
            yield from self._fused(where, first, second)
        for where, first, second in self._pairs(_BY_HEAD) if self._interleaved else ():
            yield from self._by_head(where, first, second)
        for where, first, second in (*self._pairs(_CHANNELS), *self._pairs(_HALVED)):
            inner, outer = self._sides(first)[0], self._sides(second)[1]
            if inner in (outer, 2 * outer):
                sides = self._side(first, inner - outer, 1), self._side(second, 0, 1, inward=True)
                yield Pairing(where, "channels", *sides, outer, 1, 1)

    def _apart(self, where: str, kind: str, first: str, second: str) -> Iterator[Pairing]:
        into, out = self._sides(first)[0], self._sides(second)[0 if kind == "query-key" else 1]
        if kind == "query-key":
            heads = self._heads(into, out)
            if heads is not None:
                sides = self._side(first, 0, heads.size), self._side(second, 0, heads.size)
                yield Pairing(where, "query-key", *sides, heads.queries, heads.queries // heads.keys, heads.size)
            return
        heads = self._heads(out, into)  # there are as many outputs as queries, and as many values as keys
        if heads is not None:
            sides = self._side(second, 0, heads.size, inward=True), self._side(first, 0, heads.size)
            yield Pairing(where, "value-output", *sides, heads.queries, heads.queries // heads.keys, heads.size)

    def _fused(self, where: str, first: str, second: str) -> Iterator[Pairing]:
        total, inner = self._sides(first)[0], self._sides(second)[1]
        keys = (total - inner) // 2
        heads = self._heads(inner, keys) if total == inner + 2 * keys and keys > 0 else None
        if heads is None:
            return
        size, shared = heads.size, heads.queries // heads.keys
        query, key, value = (self._side(first, start, size) for start in (0, inner, inner + keys))
        yield Pairing(where, "query-key", query, key, heads.queries, shared, size)
        yield Pairing(
            where, "value-output", self._side(second, 0, size, inward=True), value, heads.queries, shared, size
        )

    def _by_head(self, where: str, first: str, second: str) -> Iterator[Pairing]:
        total, inner = self._sides(first)[0], self._sides(second)[1]
        heads = self._heads(inner, inner) if total == 3 * inner else None
        if heads is None:
            return
        size = heads.size
        query, key, value = (Side(self._known[first].name, n * size, 3 * size, False) for n in range(3))
        output = self._side(second, 0, size, inward=True)
        yield Pairing(where, "query-key", query, key, heads.queries, 1, size)
        yield Pairing(where, "value-output", output, value, heads.queries, 1, size)

    def _pairs(self, table: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
        """What is there of these pairs: the part of the name that they share, and both."""
        for first, second in table:
            for module in self._known:
                if not module.endswith(first) or not _whole(module, first):
                    continue
                where = module[: -len(first)]
                if where + second in self._known:
                    yield where.rstrip("."), module, where + second

    def _heads(self, queries: int, keys: int) -> _Heads | None:
        """Of a layer with so many rows of queries and of keys."""
        for config in self._configs:
            count = _number(config, _HEADS)
            groups = _number(config, _GROUPS) or count
            if not count or not groups or count % groups or queries % count or keys % groups:
                continue
            size = queries // count
            if size * groups == keys and _number(config, _SIZES) in (0, size):
                return _Heads(count, groups, size)
            if (alone := _number(config, _SIZES)) and queries == count * alone == keys * count // groups:
                return _Heads(count, groups, alone)
            if queries == keys:  # a layer of the other kind of a model that has both
                return _Heads(count, count, size)
        return _Heads(1, 1, queries) if queries == keys <= _LARGEST else None

    def _sides(self, module: str) -> tuple[int, int]:
        """Rows and columns of a weight that is out × in."""
        rows, columns = self._known[module].shape
        return (columns, rows) if self._is_turned(module) else (rows, columns)

    def _side(self, module: str, start: int, step: int, *, inward: bool = False) -> Side:
        """`inward`: heads are what goes into a layer, not what comes out."""
        return Side(self._known[module].name, start, step, inward != self._is_turned(module))

    def _is_turned(self, module: str) -> bool:
        return module.rpartition(".")[2] in self._turned


def _number(config: Config, keys: Sequence[str]) -> int:
    """The first of these keys that has a number above 0; 0 where there is none."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _whole(module: str, end: str) -> bool:
    """Whether `end` begins at a part of the name: `Attention.q` may end a longer one."""
    return end[0].isupper() or len(module) == len(end) or module[-len(end) - 1] == "."
