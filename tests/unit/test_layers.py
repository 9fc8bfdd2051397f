"""The architecture, read from the imports: a module uses only modules of the rows above it."""

import ast
from pathlib import Path

import continual

ROWS = (
    ("errors",),
    ("records", "retrying"),
    ("config", "provenance", "linalg"),
    ("rules", "tensors", "objectives"),
    ("hub", "state"),
    ("sources", "gates", "executors", "texts"),
    ("engine",),
    ("publish",),
    ("tuning",),
    ("selection",),
    ("making",),
    ("api",),
    ("service",),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}
ROOT = Path(continual.__file__).parent


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """First parts of the `continual.*` modules that `file` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "continual":
            found |= {alias.name for alias in node.names if alias.name in RANK}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("continual."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("continual.")}
    return found


def test_every_module_has_a_row() -> None:
    assert {part_of(f) for f in ROOT.rglob("*.py")} == set(RANK)


def test_imports_point_upwards() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted(ROOT.rglob("*.py"))
        for name in sorted(imported(file))
        if name != part_of(file) and RANK[name] >= RANK[part_of(file)]
    ]
    assert wrong == []


def test_durable_writes_only_in_state() -> None:
    calls = [
        f"{file.relative_to(ROOT)}: {call}"
        for file in ROOT.rglob("*.py")
        if part_of(file) not in ("state", "demo")
        for call in ("os.fsync", "os.link(", "os.rename", "os.replace", ".rename(", ".replace_with")
        if call in file.read_text()
    ]
    assert calls == []
