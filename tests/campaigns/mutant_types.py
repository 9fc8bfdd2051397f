"""What mypy says of mutants, for the campaign of mutations: it is run in a copy whose files hold, beside each function,
its mutants, and prints mypy's errors as JSON, a line each.

The copy wraps functions, and a wrapped `TypeGuard` is none any more: errors that its callers have for that reason are
not a mutant's. So an error outside every mutant is left out, and so is one that the unchanged function has, too.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_MARK = "__mutmut_"


class MutantError(NamedTuple):
    """An error of mypy: in which function of the copy, what it says, and mypy's own line."""

    function: str | None
    message: str
    line: str


def functions(file: Path) -> list[tuple[int, int, str]]:
    """First and last line, and the name, of every function in a file that is a mutant or the unchanged one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.lineno, node.end_lineno or node.lineno, node.name) for node in found if _MARK in node.name]


def of_mutants(errors: list[MutantError]) -> list[str]:
    """The lines of the errors that a mutant has and the unchanged function has not."""
    before = {
        (e.function.rpartition(_MARK)[0], e.message) for e in errors if e.function and e.function.endswith("orig")
    }
    return [
        e.line
        for e in errors
        if e.function and not e.function.endswith("orig") and (e.function.rpartition(_MARK)[0], e.message) not in before
    ]


def main() -> None:
    """Runs mypy here, and prints what is left. mutmut wants the word `mypy` among the arguments, to know the form."""
    command = [sys.executable, "-m", "mypy", "--output", "json", "--no-warn-unused-ignores"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    known: dict[str, list[tuple[int, int, str]]] = {}
    errors: list[MutantError] = []
    for line in told.splitlines():
        if not line.startswith("{"):
            continue
        body = json.loads(line)
        if body["severity"] != "error":
            continue
        file = body["file"]
        if file not in known:
            known[file] = functions(Path(file))
        function = next((name for first, last, name in known[file] if first <= body["line"] <= last), None)
        errors.append(MutantError(function, body["message"], line))
    kept = of_mutants(errors)
    print("\n".join(kept))
    sys.exit(1 if kept else 0)


if __name__ == "__main__":
    main()
