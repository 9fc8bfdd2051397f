"""Every kind of source there is: the one list that the daemon, `continual watch --once` and the status page go by.

A new kind is a module in this folder and a row here.
"""

from __future__ import annotations

from continual.config import Settings
from continual.errors import Misconfigured
from continual.hub.locate import Opener
from continual.sources import folder, hub
from continual.sources.contract import Source, SourceKind, Wiring, table_of

KINDS: tuple[SourceKind, ...] = (folder.KIND, hub.KIND)


def title_of(name: str) -> str:
    """How people are told of a kind of source."""
    return next((kind.title for kind in KINDS if kind.name == name), name)


def must_watch(settings: Settings) -> None:
    """Raises Misconfigured where the settings ask for no source, or have a table of a source that does not exist."""
    tables = {kind.name: kind.table for kind in KINDS if kind.table is not None}
    for name in settings.sources:
        if name not in tables:
            known = ", ".join(sorted(tables)) or "none"
            raise Misconfigured(f"sources.{name}: there is no such source with a table of its own; known are: {known}")
    if not any(kind.is_wanted(settings) for kind in KINDS):
        raise Misconfigured(
            "nothing to watch: name a folder with watch = [DIR] (--watch DIR), "
            "or set hub.watch = true (--hub watch=true)"
        )


def check(settings: Settings) -> None:
    """Raises Misconfigured where nothing is watched, or something that cannot be; opens nothing."""
    must_watch(settings)
    for kind in KINDS:
        if kind.is_wanted(settings):
            if kind.table is not None:
                table_of(settings, kind.name, kind.table)
            kind.check(settings)


def make(wiring: Wiring) -> list[Source]:
    """The sources that the settings ask for. Raises Misconfigured."""
    return [source for kind in KINDS if kind.is_wanted(wiring.settings) for source in kind.make(wiring)]


def openers(settings: Settings) -> dict[str, Opener]:
    """Who opens models that are neither in a folder nor on the Hub, by the scheme of their origin."""
    return {
        kind.scheme: kind.opener(settings)
        for kind in KINDS
        if kind.scheme is not None and kind.opener is not None and kind.is_wanted(settings)
    }
