"""Which value a module has in `rank_pattern` or `alpha_pattern` of an adapter. The keys are a stranger's regular
expressions, so they are matched by an engine that needs no more than time in proportion to the name (RE2).

A key has the meaning that PEFT gives it (`get_pattern_key`): it fits a module if it matches the whole name, or what
stands after one of its dots; of several keys the first one counts. Most keys are names: they are looked up, and need no
engine, however many there are. The rest is of a small language in which Python's `re` and RE2 mean the same. Why:
ops/decisions/0025-patterns-and-outside-bytes.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

import re2

from continual.errors import Refuse
from continual.outside import shown

MOST = 100_000
"""Keys of a table; most of them have to be names."""
MOST_EXPRESSIONS = 256
"""Keys of a table that are more than names."""
_LONGEST = 1000
_LARGEST = 5000
"""Instructions of all expressions of a table together."""
_STEPS = 100_000_000
"""Instructions times characters of the modules' names. The worst expression takes some 10 ns for each."""
_COMPARISONS = 500_000
"""Names that are compared letter by letter, where a dot can stand for one."""
_MEMORY = 512 << 10
"""Bytes that the engine may take for an expression."""
_SPECIAL = re.compile(r"[\\^$*+?{}\[\]|()]")
_PUNCTUATION = r"[ !-/:-@\[-`{-~]"
_TOKEN = re.compile(
    rf"""(?P<repeat>(?:[*+?]|\{{[0-9]{{1,4}}(?:,[0-9]{{0,4}})?\}})\??)
    |(?P<open>\((?:\?:|\?i:|\?P<[A-Za-z_][A-Za-z0-9_]*>)?)
    |(?P<close>\))
    |(?P<between>[|^$]|\\[AbB])
    |(?P<class>\[\^?\]?(?:[^\\\[\]]|\\[dDwWsS]|\\{_PUNCTUATION})*\])
    |(?P<any>\.|\\[dDwWsS])
    |(?P<letter>\\{_PUNCTUATION}|[^\\\[\](){{}}*+?|^$.])""",
    re.VERBOSE,
)
_DIGIT = re.compile(r"[0-9]")
_ZEROS = str.maketrans("123456789", "000000000")
T = TypeVar("T")


class _Expression(Protocol):
    """An expression as RE2 has compiled it."""

    programsize: int

    def fullmatch(self, text: bytes) -> object | None: ...


class _Key(NamedTuple):
    """A key that is more than a name. `blind`: it takes all digits for the same."""

    number: int
    text: str
    blind: bool


class Patterns(Generic[T]):
    """One table. `where` and `key` name it in messages."""

    def __init__(self, table: Mapping[str, T], where: str, key: str) -> None:
        """Raises Refuse (`config`) naming a key that cannot be used, or a limit that the table exceeds."""
        self._where = f"{where}: {key}"
        self._values = list(table.values())
        self._whole = {text: number for number, text in enumerate(table)}
        if len(table) > MOST:
            raise Refuse("config", f"{self._where}: {len(table)} keys are more than the {MOST} that are read")
        self._names: dict[str, int] = {}
        self._dotted: dict[int, set[int]] = {}
        self._keys: list[_Key] = []
        for number, text in enumerate(table):
            if _SPECIAL.search(text):
                self._keys.append(self._key(number, text))
                continue
            self._names[text] = number
            if "." in text:
                self._dotted.setdefault(len(text), set()).add(_dots(text))
        self._check()

    def of(self, modules: Iterable[str]) -> dict[str, T]:
        """The values of those modules that a key fits. Raises Refuse (`config`) where finding them takes too long."""
        names = list(modules)
        first = self._named(names)
        for name, number in self._matched(names).items():
            first[name] = min(number, first.get(name, number))
        for name in names:  # PEFT looks a module that no key fits up by its whole name
            if name not in first and name in self._whole:
                first[name] = self._whole[name]
        return {name: self._values[number] for name, number in first.items()}

    def _named(self, modules: Iterable[str]) -> dict[str, int]:
        """The first key that is a name and fits, by module. A dot in a key stands for any character, as PEFT has it: a
        key of the same length fits if it has dots wherever the module has them, and equal letters."""
        found: dict[str, int] = {}
        compared = 0
        for module in modules if self._names else ():
            dots, at = _dots(module), 0
            while True:
                end = module[at:]
                within = dots & ((1 << len(end)) - 1)
                fit = [self._names[end]] if end in self._names else []
                for mask in self._dotted.get(len(end), ()):
                    compared += 1
                    if within != mask and not within & ~mask:
                        compared += len(end)
                        number = self._names.get(_with_dots(end, mask))
                        fit += [] if number is None else [number]
                if fit:
                    found[module] = min(*fit, found.get(module, fit[0]))
                at = module.find(".", at) + 1
                if not at:
                    break
            if compared > _COMPARISONS:
                raise self._too_much()
        return found

    def _matched(self, modules: Iterable[str]) -> dict[str, int]:
        """The first key that is an expression and fits, by module."""
        if not self._keys:
            return {}
        alike: dict[str, list[str]] = {}  # names that no key can tell apart are matched once
        blind = all(key.blind for key in self._keys)
        for module in modules:
            if not module.isascii():
                raise Refuse("config", f"{self._where}: expressions are not matched with {shown(module)}, write names")
            alike.setdefault(module.translate(_ZEROS) if blind else module, []).append(module)
        groups: dict[tuple[int, int], _Expression] = {}
        size = self._group(groups, 0, len(self._keys)).programsize
        if size * sum(map(len, alike)) > _STEPS:
            raise self._too_much()
        try:
            found = {text: self._first(groups, text.encode()) for text in alike}
        finally:
            re2.purge()  # what it has compiled it would keep
        return {module: number for text, number in found.items() if number is not None for module in alike[text]}

    def _first(self, groups: dict[tuple[int, int], _Expression], module: bytes) -> int | None:
        """Halves the keys that can be the first, until one is left."""
        low, high = 0, len(self._keys)
        if self._group(groups, low, high).fullmatch(module) is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._group(groups, low, middle).fullmatch(module) is None:
                low = middle
            else:
                high = middle
        return self._keys[low].number

    def _group(self, groups: dict[tuple[int, int], _Expression], low: int, high: int) -> _Expression:
        """The expression that matches what one of some keys matches."""
        if (low, high) not in groups:
            texts = "|".join(f"(?:{key.text})" for key in self._keys[low:high])
            try:
                groups[low, high] = _compiled(rf"(?:.*\.)?(?:{texts})")
            except re2.error:
                raise self._too_much() from None
        return groups[low, high]

    def _check(self) -> None:
        """Raises Refuse where there are too many expressions, or they are too large together."""
        if len(self._keys) > MOST_EXPRESSIONS:
            raise Refuse(
                "config",
                f"{self._where}: {len(self._keys)} keys are regular expressions; at most {MOST_EXPRESSIONS} are read: "
                "write names of modules instead",
            )
        size = 0
        for key in self._keys:
            try:
                size += _compiled(key.text).programsize
            except re2.error as error:
                raise self._unfit(key.text, shown(error.args[0])) from None
        re2.purge()
        if size > _LARGEST:
            raise self._too_much()
        if self._keys:
            self._group({}, 0, len(self._keys))

    def _key(self, number: int, text: str) -> _Key:
        """A key that is more than a name, checked. Raises Refuse."""
        if len(text) > _LONGEST:
            raise self._unfit(text, f"{len(text)} characters are too many")
        if not (text.isascii() and text.isprintable()):
            raise self._unfit(text, "an expression has to be of ASCII characters")
        at = depth = 0
        before = "open"
        blind = True
        while at < len(text):
            token = _TOKEN.match(text, at)
            kind = token.lastgroup if token else None
            depth += (kind == "open") - (kind == "close")
            if token is None or depth < 0 or (kind == "repeat" and before in ("open", "between", "repeat")):
                raise self._unfit(text, f"not understood from {shown(text[at:])} on")
            part = token[0].replace("0-9", "") if kind == "class" else token[0]
            blind = blind and (kind in ("repeat", "open") or not _DIGIT.search(part))
            before, at = str(kind), token.end()
        if depth:
            raise self._unfit(text, "a bracket is open")
        return _Key(number, text, blind)

    def _unfit(self, text: str, why: str) -> Refuse:
        return Refuse(
            "config",
            f"{self._where}: pattern {shown(text)} cannot be used ({why}): write names of modules, or expressions "
            "without lookaround, backreferences and flags",
        )

    def _too_much(self) -> Refuse:
        return Refuse(
            "config", f"{self._where}: its keys are too involved for so many modules: write names of modules instead"
        )


def _compiled(text: str) -> _Expression:
    options = re2.Options()
    options.max_mem, options.log_errors, options.never_capture = _MEMORY, False, True
    expression: _Expression = re2.compile(text.encode(), options)
    return expression


def _dots(text: str) -> int:
    """Where dots are, as bits, counted from the end: so they are the same in every end of a name."""
    bits, last, at = 0, len(text) - 1, text.find(".")
    while at >= 0:
        bits |= 1 << (last - at)
        at = text.find(".", at + 1)
    return bits


def _with_dots(text: str, dots: int) -> str:
    """A text with dots at the places that bits say."""
    last = len(text) - 1
    return "".join("." if dots >> (last - at) & 1 else character for at, character in enumerate(text))
