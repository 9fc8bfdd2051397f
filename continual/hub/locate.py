"""Finds the place of a model from the word of a person, the event of a source, or a record: a directory, a repo of the
Hub, or what a source of another kind opens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from continual.config import Settings
from continual.errors import Misconfigured, Refuse, Skip
from continual.records import SCHEME, Candidate, Event
from continual.tensors import Folder, Place

if TYPE_CHECKING:
    from continual.hub import Hub, Info, Repo
    from continual.hub.repo import Hear

Opener = Callable[[str, str | None, str], Place]
"""Makes a place of an origin (`scheme://…`), a revision (None: the newest) and the name of the source that saw it."""


class Places:
    """Makes places.

    `base`: the repo that the base of the state came from, if it came from one. `client`: a Hub to ask in place of the
    one that the environment names. `openers`, by scheme: open what is neither a directory nor a repo of the Hub.
    `stop`, once set, ends every wait for the Hub, and `hurry` those that bring next to nothing. `newer` is called with
    a commit that has replaced the one asked for.
    """

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
        self.hurry = threading.Event() if client is None else client.hurry
        self.client = client
        self.newer: Callable[[Info], None] = _nobody

    @cached_property
    def hub(self) -> Hub:
        """The Hub. Raises Misconfigured if the package huggingface_hub is told to stay offline."""
        from continual.hub import Hub

        return self.client or Hub(stop=self.stop, hurry=self.hurry)

    def named(self, word: str | Path) -> Place:
        """The place that a person names: a path, or a repo as `hf://ORG/NAME@REVISION`. The scheme can be left out
        where no such path exists.

        Raises Misconfigured for a word that is neither, Refuse and Trouble of a repo that cannot be read.
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
        """The place of a model that a source saw.

        A repo is refused (`superseded`) when it is read if its commit is not the newest one any more; Skip is raised
        then if the settings leave the repo out. A repo of `continual retry` is read at the commit of its record.
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

        return self._repo(event.name, event.revision, source=event.source, vet=vet)

    def of(self, candidate: Candidate) -> Place:
        """The place of a candidate that a record names."""
        origin, source = candidate.origin, candidate.source
        if not origin.startswith(SCHEME):
            if opener := self._opener(origin):
                return opener(origin, candidate.revision, source)
            return Folder(Path(origin), source=source)
        return self._repo(origin.removeprefix(SCHEME), candidate.revision, source=source)

    def tokenizer(self, word: str, folded: Sequence[Candidate]) -> Place | None:
        """Where the tokenizer of an export comes from: a model that was `folded`, by its name, else what a person names
        as `named` has it; None for the base. Raises Misconfigured."""
        if word == "base":
            return None
        if found := next((candidate for candidate in reversed(folded) if candidate.answers(word)), None):
            return self.of(found)
        try:
            return self.named(word)
        except Misconfigured as error:
            raise Misconfigured(f"tokenizer = {word}: no model in the merge is called so, and {error}") from None

    def _opener(self, origin: str) -> Opener | None:
        """The function that opens an origin of another kind; None for a path and for a repo of the Hub. Raises
        Misconfigured for an unknown scheme."""
        scheme, found, _ = origin.partition("://")
        if not found or origin.startswith(SCHEME):
            return None
        if scheme not in self._openers:
            raise Misconfigured(
                f"{origin}: nothing opens what begins with {scheme}://; is the table of its source in the settings?"
            )
        return self._openers[scheme]

    def _repo(self, repo: str, revision: str | None, *, source: str, vet: Hear | None = None) -> Repo:
        """A repo; with `vet` its commit has to be the newest one."""
        from continual.hub.repo import Access, Repo

        access = Access(self.settings.hub.read, self.settings.workers or None)
        if vet is not None:
            access = access._replace(newest=True, vet=vet, newer=self.newer)
        return Repo(self.hub, repo, revision, source=source, access=access)

    def left_out(self, info: Info, called: str | None = None) -> str | None:
        """Why the settings leave a repo out, in a few words; None if they let it in. `called`: the name that was asked
        for, which a renamed repo does not have any more."""
        from continual.hub.wanted import left_out

        return left_out(info, self.settings.hub, self.bases, self.settings.release.repo, called)

    def check(self) -> None:
        """Raises Misconfigured for settings of the Hub that cannot be used, or with which no repo would be found."""
        from continual.hub.wanted import check

        check(self.settings.hub)
        if self.settings.hub.watch and not self.bases:
            raise Misconfigured(
                "hub.watch = true, and the base of this state came from a folder: "
                "name its repo with hub.bases (--hub bases=ORG/NAME)"
            )


def _nobody(_info: Info) -> None:
    """Does nothing: nobody asked to hear of newer commits."""
