"""A page of results: its tables are made by programs, its prose by hand. Here a page gets new tables, and keeps
everything else: prose, sections that no result is there for, and rows of tables that other runs made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """Tables under a heading, in order, each as its lines. `keys`: where other runs have rows in the same tables, by
    how many first columns a row is known; 0: the tables are of these results alone."""

    heading: str
    tables: Sequence[Sequence[str]]
    keys: int = 0


def written(text: str, sections: Sequence[Section]) -> str:
    """The page with the tables of these sections. The n-th table of a section takes the place of the n-th that is
    there, and further ones stay. A section that the page does not have comes before the next one that it has, or last.
    Raises SystemExit where a table that keeps rows of other runs has other columns than they have."""
    parts = _parts(text)
    for number, section in enumerate(sections):
        at = _place(parts, section.heading)
        if at is None:
            later = (_place(parts, other.heading) for other in sections[number + 1 :])
            at = next((place for place in later if place is not None), len(parts))
            parts.insert(at, f"## {section.heading}\n")
        parts[at] = _filled(parts[at], section)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def update(page: Path, title: str, sections: Iterable[Section]) -> None:
    """The same of a file, which begins with the title alone where it is not there yet."""
    text = page.read_text() if page.is_file() else f"# {title}\n"
    page.write_text(written(text, list(sections)))


def _parts(text: str) -> list[str]:
    """The page, cut before each heading; a line of code that begins with # is none."""
    parts, fenced = [""], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            parts.append("")
        parts[-1] += line
    return [part for part in parts if part]


def _place(parts: Sequence[str], heading: str) -> int | None:
    """Which part has this heading, at whatever level."""
    return next((at for at, part in enumerate(parts) if part.partition("\n")[0].lstrip("#").strip() == heading), None)


def _filled(part: str, section: Section) -> str:
    blocks = part.strip("\n").split("\n\n")
    places = [at for at, block in enumerate(blocks) if block.startswith("|")]
    for number, table in enumerate(section.tables):
        if number < len(places):
            old = blocks[places[number]].split("\n")
            blocks[places[number]] = "\n".join(_rows(old, table, section) if section.keys else table)
        else:
            blocks.insert(places[-1] + 1 if places else len(blocks), "\n".join(table))
            places.append(places[-1] + 1 if places else len(blocks) - 1)
    return "\n\n".join(blocks)


def _rows(old: Sequence[str], new: Sequence[str], section: Section) -> Iterator[str]:
    """The rows that were there, each in its place, with what is new in place of those of the same keys, and then what
    nobody had."""
    if old[0] != new[0]:
        raise SystemExit(f"{section.heading}: the table that is there has other columns, so that its rows cannot stay")
    fresh = {_key(row, section.keys): row for row in new[2:]}
    yield from new[:2]
    for row in old[2:]:
        yield fresh.pop(_key(row, section.keys), row)
    yield from fresh.values()


def _key(row: str, count: int) -> tuple[str, ...]:
    return tuple(cell.strip(" *") for cell in row.strip("|").split("|")[:count])
