"""The lists that have pages of their own: the timeline of folds, and what was refused."""

from __future__ import annotations

from continual.outside import counted
from continual.service.web.pages import pictures, record_tables
from continual.service.web.pages.markup import Html, TypedCommand, commands, finder, pager, paragraph, section
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.recalled import FoldList, LayerPicture, RefusalList, RowsWanted


def folds(found: FoldList, picture: LayerPicture, wanted: RowsWanted, around: Around) -> str:
    """The timeline of folds, whatever became of each."""
    count = counted(found.count, "fold") + (f' with "{wanted.search}" in the path or key' if wanted.search else "")
    return document(
        Frame("/folds", "Folds, continual", around),
        "<h1>Folds</h1>",
        section("layers", "What the newest folds changed", _layers(picture)),
        section(
            "timeline",
            "Timeline",
            finder("/folds", wanted.search, "Name or path of a model"),
            paragraph(count),
            pictures.lengths(found.rows),
            record_tables.timeline(found.rows),
            pager("/folds", wanted.search, found.before, first=wanted.before is None),
        ),
    )


def refusals(found: RefusalList, wanted: RowsWanted, around: Around) -> str:
    """What was refused, with the reason of each."""
    count = counted(found.count, "refusal") + (f' with "{wanted.search}" in the path or key' if wanted.search else "")
    todo = [
        TypedCommand(("quarantine",), "lists what is kept out now"),
        TypedCommand(("retry", "RECORD"), "has a model looked at again"),
    ]
    return document(
        Frame("/refusals", "Refusals, continual", around),
        "<h1>Refusals</h1>",
        section(
            "refusals",
            "",
            finder("/refusals", wanted.search, "Name or path of a model"),
            paragraph(count),
            record_tables.refusals(found.rows),
            pager("/refusals", wanted.search, found.before, first=wanted.before is None),
        ),
        section("todo", "What can be done", commands(todo, around.state)),
    )


def _layers(picture: LayerPicture) -> Html:
    drawn = pictures.layers(picture)
    return drawn or paragraph("No record of a fold that is in the merge says it.", "none")
