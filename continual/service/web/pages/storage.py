"""The page of what lies on the disk: the generations, which records hold each, what they take."""

from __future__ import annotations

from collections.abc import Sequence

from continual.outside import counted
from continual.service.web.pages.markup import Html, TypedCommand, commands, escape, paragraph, section, table
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.recalled import KeptGeneration
from continual.texts import size, when


def render(found: Sequence[KeptGeneration], free: int | None, around: Around) -> str:
    """The page. `free`: bytes that are free on the disk of the state; None where it is on none."""
    whole = sum(one.nbytes for one in found)
    room = "" if free is None else f"; {size(free)} are free"
    told = (
        f"{counted(len(found), 'generation')}, {size(whole)}{room}. The settings keep and keep_bytes "
        "say how many stay; what is in force, and what a tag names, stays always."
    )
    todo = [
        TypedCommand(("tag", "NAME", "--at", "RECORD"), "keeps the generation of a record for good"),
        TypedCommand(("rollback", "RECORD", "--dry-run"), "says what going back to a record undoes"),
        TypedCommand(("verify",), "reads every file, and says what is not as it was written"),
    ]
    return document(
        Frame("/storage", "Storage, continual", around),
        "<h1>Storage</h1>",
        section("generations", "Generations", paragraph(told), _table(found)),
        section("todo", "What can be done", commands(todo, around.state)),
    )


def _table(found: Sequence[KeptGeneration]) -> Html:
    if not found:
        return paragraph("Nothing is folded yet.", "none")
    return table(
        ("records", "made", "bytes", "tags", "generation"),
        (
            (
                f"{one.first}" if one.first == one.last else f"{one.first} to {one.last}",
                when(one.time),
                size(one.nbytes),
                ", ".join(one.tags),
                Html(f"{escape(one.name[:16])}{' <b>in force</b>' if one.in_force else ''}"),
            )
            for one in found
        ),
    )
