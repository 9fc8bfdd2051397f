"""How large the rooms may grow: lines, classes, functions, parameters, columns, and types that say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import house, pages

KNOWN = house.modules()
COLUMNS = 120


def test_few_modules_lie_beside_the_rooms() -> None:
    assert len(house.loose(KNOWN)) <= 10, house.loose(KNOWN)


def test_modules_have_at_most_400_lines() -> None:
    long = [name for name, module in KNOWN.items() if len(module.text.splitlines()) > 400]
    assert long == []


def test_classes_have_at_most_250_lines() -> None:
    long = [f"{where} {name}: {lines}" for name, where, lines in house.classes(KNOWN) if lines > 250]
    assert long == []


def test_functions_have_at_most_60_lines() -> None:
    long = [f"{f.where}: {f.lines}" for f in house.functions(KNOWN) if f.lines > 60 and not f.command]
    assert long == []


def test_functions_have_at_most_6_parameters() -> None:
    many = [f"{f.where}: {f.parameters}" for f in house.functions(KNOWN) if f.parameters > 6 and not f.command]
    assert many == []


def test_types_say_what_they_hold() -> None:
    uses = {name: house.uses_of_any(module) for name, module in KNOWN.items()}
    lines = sum(len(module.text.splitlines()) for module in KNOWN.values())
    assert 1000 * sum(uses.values()) / lines < 5, {name: n for name, n in uses.items() if n}


def test_lines_have_at_most_120_columns() -> None:
    files = [*house.ROOT.rglob("*.py"), *(house.ROOT.parent / "tests").rglob("*.py")]
    long = [
        f"{file.relative_to(house.ROOT.parent)}:{number}: {len(line)}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert long == []


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_pages_have_at_most_120_columns(page: Path) -> None:
    """But for the rows of tables, which markdown cannot break, and what a command has printed."""
    text = page.read_text()
    for block in pages.blocks(page, ""):
        if block.startswith("$ "):
            text = text.replace(block, "")
    assert [line for line in text.splitlines() if len(line) > COLUMNS and not line.startswith("|")] == []
