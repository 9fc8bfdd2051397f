"""The package as a plan: its modules, rooms and imports, read from the source without running it.

A *room* is a folder of the package, or a module beside the folders. An *arrow* says that some module of one room
imports from another room, wherever in its code. A room's *floor* is one above the highest floor that it sees.
`python -m tests.campaigns.house` prints the figures.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2] / "continual"


@dataclass(frozen=True)
class Module:
    """One file: `name` is dotted (`continual.rules.ties`), a folder's `__init__` has the folder's name."""

    name: str
    file: Path

    @cached_property
    def text(self) -> str:
        return self.file.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.name.split(".")[1] if "." in self.name else "__init__"

    def imports(self, known: Mapping[str, Module]) -> set[str]:
        """The modules of `known` that this one imports, also inside functions and for type checkers alone.

        `from continual.rules import ties` is an import of `ties`; of a name that is no module, one of the folder.
        """
        found = set(self._imported[0])
        for source, full in self._imported[1]:
            found.add(full if full in known else source)
        return (found & set(known)) - {self.name}

    @cached_property
    def _imported(self) -> tuple[set[str], list[tuple[str, str]]]:
        """What `import` names; and for each name that `from` takes, from where, and whole."""
        plain, taken = set[str](), list[tuple[str, str]]()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                plain |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = self._source(node)
                taken += [(source, f"{source}.{alias.name}") for alias in node.names]
        return plain, taken

    def _source(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        folder = self.name.split(".") if self.file.name == "__init__.py" else self.name.split(".")[:-1]
        return ".".join([*folder[: len(folder) - node.level + 1], *([node.module] if node.module else [])])


class Function(NamedTuple):
    """A function or method of the package."""

    where: str
    lines: int
    parameters: int
    command: bool


@cache
def modules(root: Path = ROOT) -> Mapping[str, Module]:
    """Every module under `root`, by name: each is read and parsed once."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        name = ".".join(("continual", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = Module(name, file)
    return found


def loose(known: Mapping[str, Module]) -> list[str]:
    """The modules beside the folders, the package's face among them."""
    return [name for name, module in known.items() if module.file.parent.samefile(known["continual"].file.parent)]


def module_imports(known: Mapping[str, Module]) -> dict[str, set[str]]:
    """Which modules each module imports."""
    return {name: module.imports(known) for name, module in known.items()}


def arrows(known: Mapping[str, Module]) -> dict[str, set[str]]:
    """Which rooms each room sees."""
    found: dict[str, set[str]] = {module.room: set() for module in known.values()}
    for name, targets in module_imports(known).items():
        room = known[name].room
        found[room] |= {known[target].room for target in targets} - {room}
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that lead back to themselves (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            start = stack.index(node)
            group = sorted(stack[start:])
            del stack[start:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def floors(edges: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each node of a graph without circles, from 1."""
    found: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in found:
            found[node] = 1 + max((floor(target) for target in edges[node]), default=0)
        return found[node]

    for node in edges:
        floor(node)
    return found


def classes(known: Mapping[str, Module]) -> Iterator[tuple[str, str, int]]:
    """Name, place and number of lines of every class."""
    for module in known.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                yield node.name, f"{module.name}:{node.lineno}", _lines(node)


def functions(known: Mapping[str, Module]) -> Iterator[Function]:
    """Every function; `self` and `cls` are no parameters."""
    for module in known.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield Function(
                    f"{module.name}:{node.lineno} {node.name}",
                    _lines(node),
                    len([a for a in taken if a.arg not in ("self", "cls")]),
                    any(ast.unparse(d).partition("(")[0].endswith(".command") for d in node.decorator_list),
                )


def uses_of_any(module: Module) -> int:
    """How often a type says `Any`."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(module.tree))


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1
