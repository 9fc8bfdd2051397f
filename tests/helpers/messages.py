"""What the package says when something goes wrong, read from the code, and the page that says what to do then.

`messages` yields every text that an error is raised with: what is filled in is `…`, and a text that is put together
from others is followed to them. Of `ops/docs/troubleshooting.md` a person writes the sections; a marker in each says
which messages belong there, and `written` fills in the tables.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.helpers import house
from tests.helpers.pages import DOCS

PAGE = DOCS / "troubleshooting.md"
KINDS = {
    "Refuse": "refused",
    "Skip": "left out",
    "Retry": "try again",
    "Trouble": "try again",
    "Abandoned": "given up",
    "Misconfigured": "usage",
    "NotFinite": "usage",
    "ValueError": "usage",
    "Damaged": "damaged",
    "Halt": "stopped",
    "Busy": "busy",
}
"""The errors, as the page calls what they are. A ValueError with a text of ours is a part of another's."""
_LIKE = {"Trouble": "Retry", "ValueError": "Misconfigured", "NotFinite": "Misconfigured"}
"""Those that have the sections of another."""
MARK = re.compile(r"<!-- messages: (.+?) -->\n(.*?)<!-- end of messages -->\n", re.DOTALL)
_MOST = 12
"""Variants of one text that are told apart; of one with more, what makes them is `…`."""
_FATES = {"MemberFate": (3, (4,)), "_refuse": (0, (1,)), "Foreign": (0, (1, 2))}
"""What else gives a candidate a fate or says why: where its reason stands, and where its words."""


class Message(NamedTuple):
    """A text that an error is raised with: `kind`, the error; `reason`, of a refusal, else empty, also where it is
    found when it is raised; `text`, in which `…` stands for what is filled in."""

    where: str
    kind: str
    reason: str
    text: str


class Section(NamedTuple):
    """A part of the page: its heading, what a person wrote between it and the table, and what belongs there: words as
    `Refuse/gone` (a reason), `Misconfigured/engine.base` (a room or module) or `Busy` (all others of a kind)."""

    title: str
    prose: str
    words: tuple[str, ...]


class _Texts:
    """The texts that an expression of one function can come to."""

    def __init__(self, module: house.Module, scope: ast.AST) -> None:
        self._module = module
        self._scope = scope

    def of(self, node: ast.expr, deep: int = 0) -> list[str]:
        """All of them; what cannot be told is `…`."""
        if deep > 6:
            return ["…"]
        found: list[str] = []
        match node:
            case ast.Constant(value=str(text)):
                found = [text]
            case ast.JoinedStr(values=parts):
                found = self._together([self.of(part, deep + 1) for part in parts])
            case ast.FormattedValue(value=inner):
                found = self.of(inner, deep + 1)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                found = self._together([self.of(left, deep + 1), self.of(right, deep + 1)])
            case ast.IfExp(body=one, orelse=other):
                found = [*self.of(one, deep + 1), *self.of(other, deep + 1)]
            case ast.BoolOp(values=values):
                found = [text for value in values for text in self.of(value, deep + 1)]
            case ast.Name(id=name):
                found = self._named(name, deep)
            case ast.Subscript(value=inner) | ast.Starred(value=inner):
                found = self.of(inner, deep + 1)
            case ast.Dict(values=values) | ast.List(elts=values) | ast.Tuple(elts=values):
                found = [text for value in values for text in self.of(value, deep + 1)]
            case ast.GeneratorExp(elt=inner) | ast.ListComp(elt=inner):
                found = self.of(inner, deep + 1)
            case ast.Call():
                found = self._called(node, deep)
            case _:
                pass
        return list(dict.fromkeys(found)) or ["…"]

    @staticmethod
    def _together(parts: list[list[str]]) -> list[str]:
        """Texts made of parts that follow each other."""
        many = 1
        for number, part in enumerate(parts):
            many *= len(part)
            if many > _MOST:
                many //= len(part)
                parts[number] = ["…"]
        return ["".join(chosen) for chosen in itertools.product(*parts)]

    def _called(self, node: ast.Call, deep: int) -> list[str]:
        match node.func:
            case ast.Attribute(value=ast.Constant(value=str()), attr="join"):
                return self.of(node.args[0], deep + 1)
            case ast.Attribute(value=inner, attr="format"):
                return [re.sub(r"\{\w*\}", "…", text) for text in self.of(inner, deep + 1)]
            case ast.Attribute(value=inner, attr="get"):
                return self.of(inner, deep + 1)
            case ast.Name(id=name):
                made = next((n for n in self._module.tree.body if _is_function(n, name)), None)
                if made is None:
                    return []
                inside = _Texts(self._module, made)
                returned = [n.value for n in ast.walk(made) if isinstance(n, ast.Return) and n.value is not None]
                return [text for value in returned for text in inside.of(value, deep + 1)]
        return []

    def _named(self, name: str, deep: int) -> list[str]:
        """What is given to a name: in the function, else at the top of the module."""
        for place in (self._scope, self._module.tree):
            given = [value for value in _given(place, name) if not _is_about(value, name) and not _is_empty(value)]
            if given:
                return [text for value in given for text in self.of(value, deep + 1)]
        return []


def _is_function(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def _is_about(value: ast.expr, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(value))


def _is_empty(value: ast.expr) -> bool:
    return isinstance(value, ast.List) and not value.elts


def _given(place: ast.AST, name: str) -> Iterator[ast.expr]:
    """Every value that a name gets, and what is added to a list of that name."""
    nodes = place.body if isinstance(place, ast.Module) else ast.walk(place)
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                yield value
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == name:
                yield value
            case ast.AugAssign(target=ast.Name(id=found), value=value) if found == name:
                yield value
            case ast.Call(func=ast.Attribute(value=ast.Name(id=found), attr="append"), args=[value]) if found == name:
                yield value
            case _:
                pass


def _calls(tree: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Every call with the innermost function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield scope, node
        yield from _calls(node, node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else scope)


@cache
def messages() -> tuple[Message, ...]:
    """Every message of the package, each shape once in a module; the demonstration's are not among them."""
    found: dict[tuple[str, str, str, str], Message] = {}
    for name, module in house.modules().items():
        if module.room == "demo":
            continue
        for scope, call in _calls(module.tree, module.tree):
            for kind, reason, text in _said(_Texts(module, scope), call):
                message = Message(f"{name}:{call.lineno}", kind, reason, _shown(text))
                found.setdefault((name, kind, reason, message.text), message)
    return tuple(found.values())


def _said(texts: _Texts, call: ast.Call) -> Iterator[tuple[str, str, str]]:
    """Error, reason and text of each message that a call makes; nothing where it makes none."""
    called = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    kind, reasons, said = called, [""], call.args[:1]
    if called in _FATES and len(call.args) > max(_FATES[called][1]):
        first, others = _FATES[called]
        kind, reasons, said = "Refuse", texts.of(call.args[first]), [call.args[n] for n in others]
    elif called == "_wrong" and isinstance(
        call.func, ast.Attribute
    ):  # of a recipe of another program: the key, and what is wrong with it
        kind, said = "Misconfigured", call.args[1:2]
    elif called == "Refuse":
        reasons, said = texts.of(call.args[0]), [call.args[1]]
    elif {"reason", "message"} <= given.keys():
        kind, said = "Refuse", [given["message"]]
        reasons = [reason for reason in texts.of(given["reason"]) if reason not in ("", "…")]
    elif called not in KINDS:
        return
    for reason, *parts in itertools.product(reasons, *(texts.of(part) for part in said)):
        text = ("…: " if called == "_wrong" else "") + "; ".join(parts)
        if text:
            yield kind, "" if reason == "…" else reason, f"…: {text}" if called == "ValueError" else text


def _shown(text: str) -> str:
    """On one line, with one `…` for several that touch each other."""
    return re.sub(r"…+", "…", " ".join(text.split()))


def speechless(message: Message) -> bool:
    """Whether a message has hardly a word of its own, as `…: …`: all of it comes from what it passes on."""
    return len("".join(re.findall(r"\w+", message.text))) < 6


def sections(text: str) -> list[Section]:
    """The parts of the page that have a table of messages."""
    found = []
    for mark in MARK.finditer(text):
        before = text[: mark.start()]
        title, _, prose = before.rpartition("\n## ")[2].partition("\n")
        found.append(Section(title, prose.strip(), tuple(mark[1].split())))
    return found


def placed(known: list[Section]) -> Mapping[Message, Section | None]:
    """The section of each message: of those that name it the one that does so most closely, None where none does."""
    words = {word: section for section in known for word in section.words}
    found: dict[Message, Section | None] = {}
    for message in messages():
        kind = _LIKE.get(message.kind, message.kind)
        path = message.where.partition(":")[0].split(".")[1:]
        asked = [f"{kind}/{message.reason}"] if message.reason else []
        asked += [f"{kind}/{'.'.join(path[:n])}" for n in range(len(path), 0, -1)] + [kind]
        found[message] = next((words[word] for word in asked if word in words), None)
    return found


def written(text: str) -> str:
    """The page with the tables as they should be."""
    known = sections(text)
    of: dict[tuple[str, ...], list[Message]] = {section.words: [] for section in known}
    for message, section in placed(known).items():
        if section is not None and not speechless(message):
            of[section.words].append(message)

    def filled(mark: re.Match[str]) -> str:
        rows = sorted({(m.text, KINDS[m.kind], m.reason) for m in of[tuple(mark[1].split())]}, key=_order)
        lines = ["| it says | it is |", "|---|---|"]
        lines += [f"| `{_cell(t)}` | {kind}{f': {reason}' if reason else ''} |" for t, kind, reason in rows]
        return f"<!-- messages: {mark[1]} -->\n\n" + "\n".join(lines) + "\n\n<!-- end of messages -->\n"

    return MARK.sub(filled, text)


def _order(row: tuple[str, str, str]) -> tuple[str, ...]:
    """By the words, whatever is filled in before them."""
    return re.sub(r"[^a-z ]", "", row[0].lower()).strip(), *row


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def main() -> None:
    """Writes the tables of the page anew."""
    path: Path = PAGE
    path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
