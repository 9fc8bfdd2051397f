"""Wrong inputs for parsers: valid ones that are changed here and there, hostile values in the place of theirs, and
bytes that mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from hypothesis import strategies as st

Tree = object
"""A JSON document; `Raw` bytes in it stand for themselves."""


class Raw(NamedTuple):
    """A piece of a text, whether or not it is JSON."""

    text: bytes


HOSTILE = (
    *(Raw(text) for text in (b"NaN", b"-Infinity", b"1e400", b"-1e-400", b"9" * 4301, b"9" * 400, b"0." + b"3" * 500)),
    *(Raw(text) for text in (b"", b"{", b"]", b'"', b"\xff", b'"\xed\xa0\x80"', rb'"\ud800"', rb'"\udc00\ud800"')),
    *(Raw(text) for text in (b"[" * 90 + b"]" * 90, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"[" * 30_000)),
    *(Raw(text) for text in (b'{"a":1,"a":2}', b'"\x00"', b"\xef\xbb\xbf1", b"01", b"+1", b"1,", b"tru", b"/**/1")),
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 10**4000, 0.5, 1e300, -0.0),
    *(
        "",
        "a",
        "F32",
        "BF16",
        "F8_E4M3",
        "LORA",
        "U8",
        "..",
        "../x.safetensors",
        "/etc/passwd",
        ".hidden",
        "a\nb",
        "\x1b[2J",
    ),
    *("\u202e", "naïve", "x" * 1001, ".".join("a" * 900), "a.b" * 300, "\U0001f600", "model.safetensors", "q_proj"),
    *(
        ".*.*.*x",
        "(?i)query",
        "(a|aa)+b",
        "(",
        r"(a)\1",
        "(?=a)",
        "x{900}",
        "a?" * 300 + "b",
        "(.*a){20}",
        "[[:alpha:]]",
    ),
    *([], {}, [[]], [0], [1, -1], [1 << 61, 8], [0, 0], [4, 0], [0] * 33, {"a": 1}, {"": []}, [None], ["a", 1]),
)
LARGE = (
    Raw(b"[" + b"1," * 50_000 + b"1]"),
    Raw(b'"' + b"x" * 300_000 + b'"'),
    Raw(b"[" + b"[]," * 50_000 + b"[]]"),
    Raw(b"[" * 50_000 + b"]" * 50_000),
    Raw(b"{" + b",".join(b'"k%d":4' % i for i in range(30_000)) + b"}"),
)
"""Hostile values of some hundred kilobytes; rare."""
HUGE = Raw(b"{" + b",".join(b'"k%d":4' % i for i in range(200_000)) + b"}")
_RARE = 20
TOKENS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b"\x00", b"\xff", b"9" * 50, b"e999")
TOKENS += (
    b"\n",
    b"\r\n",
    b"(",
    b")",
    b"*",
    b"+",
    b"{9}",
    b"|",
    b".",
    b"(?",
    b"$",
    b"null",
    b"-",
    b" " * 100,
    b"\xf0\x9f",
)


def paths(tree: Tree, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every value in a document."""
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, (*at, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from paths(value, (*at, number))


def put(tree: Tree, at: Sequence[str | int], value: Tree, change: str) -> Tree:
    """A document with one value replaced, taken away, put beside itself under the same key or another one."""
    if not at:
        return value
    first, rest = at[0], at[1:]
    if isinstance(tree, list):
        assert isinstance(first, int)
        changed = [] if not rest and change == "drop" else [put(tree[first], rest, value, change)]
        return [*tree[:first], *changed, *tree[first + 1 :]]
    pairs = list(tree.items()) if isinstance(tree, dict) else list(tree) if isinstance(tree, tuple) else []
    found: list[tuple[object, Tree]] = []
    for key, old in pairs:
        if key != first:
            found.append((key, old))
        elif rest:
            found.append((key, put(old, rest, value, change)))
        elif change == "value":
            found.append((key, value))
        elif change == "key":
            found.append((value, old))
        elif change == "twice":
            found += [(key, old), (key, value)]
    return tuple(found)


def text_of(tree: Tree) -> bytes:
    """A document as bytes. Objects are dicts, or tuples of pairs, whose keys can be anything."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, dict):
        return text_of(tuple(tree.items()))
    if isinstance(tree, tuple):
        return b"{" + b",".join(text_of(key) + b":" + text_of(value) for key, value in tree) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(map(text_of, tree)) + b"]"
    return json.dumps(tree).encode()


def damaged(tree: Tree, changes: Sequence[tuple[int, int, str]]) -> bytes:
    """A document with hostile values at some of its places."""
    for where, what, change in changes:
        places = list(paths(tree))
        rare = what - _RARE * len(HOSTILE)
        value = HOSTILE[what % len(HOSTILE)] if rare < 0 else LARGE[rare]
        tree = put(tree, places[where % len(places)], value, change)
    return text_of(tree)


def cut_up(data: bytes, changes: Sequence[tuple[str, float, int, int]]) -> bytes:
    """Bytes with some of them flipped, taken away, doubled or put in between."""
    for change, place, what, length in changes:
        at = int(place * len(data))
        if change == "flip":
            data = data[:at] + bytes([what & 255]) + data[at + 1 :]
        elif change == "drop":
            data = data[:at] + data[at + length :]
        elif change == "double":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif change == "many":
            data = data[:at] + data[at : at + length] * 50 + data[at + length :]
        elif change == "token":
            data = data[:at] + TOKENS[what % len(TOKENS)] + data[at:]
        else:
            data = data[:at]
    return data


class Inputs(NamedTuple):
    """Wrong inputs: as a strategy, with which Hypothesis makes what fails small, and drawn at random, ten times as
    fast."""

    strategy: st.SearchStrategy[bytes]
    draw: Callable[[Random], bytes]


_CUTS = ("flip", "drop", "double", "many", "token", "token", "end")
_CHANGES = ("value", "value", "value", "key", "drop", "twice")
_WHATS = _RARE * len(HOSTILE) + len(LARGE)
_cuts = st.lists(
    st.tuples(st.sampled_from(_CUTS), st.floats(0, 1, exclude_max=True), st.integers(0, 1000), st.integers(1, 40)),
    min_size=1,
    max_size=5,
)
_changes = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, _WHATS - 1), st.sampled_from(_CHANGES)), min_size=1, max_size=3
)


def _drawn_cuts(chance: Random) -> list[tuple[str, float, int, int]]:
    some = range(chance.randint(1, 5))
    return [(chance.choice(_CUTS), chance.random(), chance.randrange(1001), chance.randint(1, 40)) for _ in some]


def _drawn_changes(chance: Random) -> list[tuple[int, int, str]]:
    some = range(chance.randint(1, 3))
    return [(chance.randrange(201), chance.randrange(_WHATS), chance.choice(_CHANGES)) for _ in some]


def documents(seeds: Sequence[Tree], wrap: Callable[[bytes], bytes] = bytes) -> Inputs:
    """Wrong JSON, made of valid documents. `wrap` puts the file around it that it stands in."""
    whole = [text_of(seed) for seed in seeds]
    changed = st.builds(damaged, st.sampled_from(seeds), _changes)
    cut = st.builds(cut_up, st.sampled_from(whole), _cuts)
    both = changed.flatmap(lambda text: st.builds(cut_up, st.just(text), _cuts))

    def draw(chance: Random) -> bytes:
        kind = chance.randrange(20)
        if kind == 0:
            return chance.randbytes(chance.randrange(200))
        text = damaged(chance.choice(seeds), _drawn_changes(chance)) if kind < 14 else chance.choice(whole)
        return wrap(text if kind < 10 else cut_up(text, _drawn_cuts(chance)))

    return Inputs((changed | cut | both).map(wrap) | st.binary(max_size=200), draw)


def files(seeds: Sequence[bytes]) -> Inputs:
    """Wrong files, made of valid ones."""

    def draw(chance: Random) -> bytes:
        return cut_up(chance.choice(seeds), _drawn_cuts(chance))

    return Inputs(st.builds(cut_up, st.sampled_from(seeds), _cuts) | st.binary(max_size=300), draw)


_ATOMS = (
    r"a q_proj layers . \. \d \w+ [0-9] [^.] [a .* ( ) | * + ? {2} {,3} {9,1} {900} ^ $ \b \1 (?: (?i) (?i: (?= \ ü"
)
_PARTS = tuple(_ATOMS.split(" "))
_keys = st.lists(st.sampled_from(_PARTS), max_size=12).map("".join) | st.text(max_size=12)


def _table(keys: Sequence[str]) -> bytes:
    return "\n".join(keys).encode("utf-8", "surrogatepass")


def _drawn_table(chance: Random) -> bytes:
    keys = ("".join(chance.choices(_PARTS, k=chance.randint(1, 12))) for _ in range(chance.choice((1, 1, 1, 2, 3, 8))))
    return _table([key * chance.choice((1, 1, 1, 1, 2, 30, 60)) for key in keys])


patterns = Inputs(
    st.lists(_keys | st.tuples(_keys, st.integers(2, 60)).map(lambda pair: pair[0] * pair[1]), max_size=8).map(_table),
    _drawn_table,
)
"""Keys of a table of patterns, one a line."""
