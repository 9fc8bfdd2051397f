"""What a campaign takes from other modules of this repository is there. Campaigns are run by hand and types are not
checked in them, so that a name that was renamed elsewhere would only be missed there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
CAMPAIGNS = sorted((ROOT / "tests" / "campaigns").rglob("*.py"))


def file_of(dotted: str) -> Path | None:
    """The file of a module or package of this repository."""
    at = ROOT.joinpath(*dotted.split("."))
    return next((file for file in (at.with_suffix(".py"), at / "__init__.py") if file.is_file()), None)


@cache
def bound(file: Path) -> frozenset[str]:
    """The names that a module has once it is imported; `*` where it makes names when they are asked for."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add("*" if node.name == "__getattr__" else node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


def missing(file: Path) -> list[str]:
    """What a file takes out of modules of this repository that is not there."""
    wrong = []
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(("tests", "continual")):
            continue
        source = file_of(str(node.module))
        names = bound(source) if source else frozenset()
        for alias in node.names:
            if not {alias.name, "*"} & names and file_of(f"{node.module}.{alias.name}") is None:
                wrong.append(f"{node.module}.{alias.name}")
    return wrong


def test_every_name_that_a_campaign_takes_is_there() -> None:
    wrong = {str(file.relative_to(ROOT)): names for file in CAMPAIGNS if (names := missing(file))}
    assert wrong == {}


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text(
        "from tests.campaigns import bench\nfrom tests.campaigns.bench.quality.__main__ import main, texts\n"
    )
    assert missing(file) == ["tests.campaigns.bench.quality.__main__.texts"]
