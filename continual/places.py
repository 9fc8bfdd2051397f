"""From a word, an event or a record to the place where the model is: a directory here, or a repo of the Hub, asked as the settings say."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from continual.config import Settings
from continual.errors import Misconfigured, Refuse, Skip
from continual.records import Event
from continual.tensors import Folder, Place

if TYPE_CHECKING:
    from continual.hub import Hub, Info

SCHEME = "hf://"


class Places:
    """Makes places. `base` is the repo the base of the state came from, if it did; `stop` ends waiting for the Hub."""

    def __init__(self, settings: Settings, base: str | None = None) -> None:
        self.settings = settings
        self.bases = settings.hub.bases or ((base,) if base else ())
        self.stop = threading.Event()

    @cached_property
    def hub(self) -> Hub:
        """The Hub. Raises Misconfigured where it must not be asked."""
        from continual.hub import Hub

        return Hub(stop=self.stop)

    def named(self, word: str | Path) -> Place:
        """What a person means: a path, or a repo (`hf://ORG/NAME@REVISION`, or without the scheme where no such path exists).

        Raises Misconfigured where it is neither.
        """
        from continual.hub import named

        if Path(word).exists():
            return Folder(Path(word))
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
        """What a source saw. Of a repo the commit has to be the newest still, and the settings have to let it in: else Skip is raised when it is asked for."""
        if not event.origin.startswith(SCHEME):
            return Folder(Path(event.origin), event.root, event.source)
        return self._repo(event.name, event.revision, source=event.source, newest=True, vet=self._vet)

    def of(self, candidate: Mapping[str, Any]) -> Place:
        """What a record names."""
        origin, source = str(candidate["origin"]), str(candidate["source"])
        if not origin.startswith(SCHEME):
            return Folder(Path(origin), source=source)
        return self._repo(origin.removeprefix(SCHEME), candidate.get("revision"), source=source)

    def _repo(self, repo: str, revision: str | None, **how: Any) -> Place:
        from continual.hub import Repo

        return Repo(self.hub, repo, revision, read=self.settings.hub.read, workers=self.settings.workers or None, **how)

    def left_out(self, info: Info) -> str | None:
        """Why a repo is not taken by the settings; None if it is."""
        from continual.hub.wanted import left_out

        return left_out(info, self.settings.hub, self.bases, self.settings.release.repo)

    def _vet(self, info: Info) -> None:
        if why := self.left_out(info):
            raise Skip(f"{info.id}: not taken: {why}")
