"""The page of the settings in force; secrets are masked before they come here."""

from __future__ import annotations

from collections.abc import Sequence

from continual.service.web.pages.markup import Html, paragraph, section, table
from continual.service.web.pages.shell import Around, Frame, document
from continual.service.web.recalled import SettingInForce


def render(found: Sequence[SettingInForce], around: Around) -> str:
    """The page: first those that are not as by default."""
    changed = [one for one in found if one.changed]
    others = [one for one in found if not one.changed]
    told = "A file, variables and flags set them; 'continual config show' says which. SIGHUP has the file read again."
    return document(
        Frame("/settings", "Settings, continual", around),
        "<h1>Settings in force</h1>",
        paragraph(told),
        section("changed", "Set here", _table(changed)),
        section("defaults", "As by default", _table(others)),
    )


def _table(found: Sequence[SettingInForce]) -> Html:
    if not found:
        return paragraph("None.", "none")
    return table(("setting", "value"), ((one.name, one.value) for one in found))
