"""From a word, an event or a record to the place where the model is: a directory here, a repo of the Hub, asked as
the settings say, or what a source of another kind opens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from continual.config import Settings
from continual.errors import Misconfigured, Refuse, Skip
from continual.records import Candidate, Event
from continual.tensors import Folder, Place

if TYPE_CHECKING:
    from continual.hub import Hub, Info

SCHEME = "hf://"
Opener = Callable[[str, str | None, str], Place]
"""Makes a place of an origin (`scheme://…`), a revision (None: the newest) and the name of the source that saw it."""


class Places:
    """Makes places. `base` is the repo the base of the state came from, if it did; `client` is asked in place of the
    Hub that the environment names; `stop` ends waiting for the Hub. `openers`, by scheme, open what is neither a
    directory nor a repo of the Hub."""

    def __init__(
        self,
        settings: Settings,
        base: str | None = None,
        client: Hub | None = None,
        openers: Mapping[str, Opener] = MappingProxyType({}),
    ) -> None:
        self.settings = settings
        self._openers = openers
        self.bases = settings.hub.bases or ((base,) if base else ())
        self.stop = threading.Event() if client is None else client.stop
        self._client = client
        self.newer: Callable[[Info], None] = _nobody

    @cached_property
    def hub(self) -> Hub:
        """The Hub. Raises Misconfigured where it must not be asked."""
        from continual.hub import Hub

        return self._client or Hub(stop=self.stop)

    def named(self, word: str | Path) -> Place:
        """What a person means: a path, or a repo (`hf://ORG/NAME@REVISION`, or without the scheme where no such path
        exists).

        Raises Misconfigured where it is neither.
        """
        from continual.hub import named

        if Path(word).exists():
            return Folder(Path(word))
        if opener := self._opener(str(word)):
            return opener(str(word), None, "hand")
        found = named(str(word))
        if found is None or (isinstance(word, Path) and not str(word).startswith(SCHEME)):
            raise Misconfigured(f"{word}: no such directory, and no repo of the Hub (ORG/NAME@REVISION)")
        place = self._repo(found.repo, found.revision, source="hand")
        try:
            place.must_be_there()
        except Refuse as error:
            if error.reason != "gone":
                raise
            raise Misconfigured(str(error)) from None
        return place

    def seen(self, event: Event) -> Place:
        """What a source saw. Of a repo the commit has to be the newest still, and the settings have to let it in: else
        Skip is raised when it is asked for.

        What a person wants looked at again (`retry`) is read at the commit it was.
        """
        if not event.origin.startswith(SCHEME):
            if opener := self._opener(event.origin):
                return opener(event.origin, event.revision, event.source)
            return Folder(Path(event.origin), event.root, event.source)
        if event.source == "retry":
            return self._repo(event.name, event.revision, source="hub")

        def vet(info: Info) -> None:
            if why := self.left_out(info, event.name):
                raise Skip(f"{info.id}: not taken: {why}")

        return self._repo(event.name, event.revision, source=event.source, newest=True, vet=vet, newer=self.newer)

    def of(self, candidate: Candidate) -> Place:
        """What a record names."""
        origin, source = candidate.origin, candidate.source
        if not origin.startswith(SCHEME):
            if opener := self._opener(origin):
                return opener(origin, candidate.revision, source)
            return Folder(Path(origin), source=source)
        return self._repo(origin.removeprefix(SCHEME), candidate.revision, source=source)

    def _opener(self, origin: str) -> Opener | None:
        """Who opens an origin of another kind; None for a path, and for a repo of the Hub. Raises Misconfigured for a
        scheme that nobody knows."""
        scheme, found, _ = origin.partition("://")
        if not found or origin.startswith(SCHEME):
            return None
        if scheme not in self._openers:
            raise Misconfigured(
                f"{origin}: nothing opens what begins with {scheme}://; is the table of its source in the settings?"
            )
        return self._openers[scheme]

    def _repo(self, repo: str, revision: str | None, **how: Any) -> Place:
        from continual.hub import Repo

        return Repo(self.hub, repo, revision, read=self.settings.hub.read, workers=self.settings.workers or None, **how)

    def left_out(self, info: Info, called: str | None = None) -> str | None:
        """Why a repo is not taken by the settings; None if it is. `called`: the name under which it was asked for."""
        from continual.hub.wanted import left_out

        return left_out(info, self.settings.hub, self.bases, self.settings.release.repo, called)

    def check(self) -> None:
        """Raises Misconfigured for settings of the Hub that cannot be used, or would find nothing."""
        from continual.hub.wanted import check

        check(self.settings.hub)
        if self.settings.hub.watch and not self.bases:
            raise Misconfigured(
                "hub.watch = true, and the base of this state came from a folder: name its repo with hub.bases (--hub bases=ORG/NAME)"
            )


def _nobody(_info: Info) -> None:
    """Nobody wants to know."""
