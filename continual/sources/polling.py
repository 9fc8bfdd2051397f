"""One look at what the Hub lists for the settings: listings page by page, and the repos that are named. What fits goes
into the cursor; what does not is told. A look has limits, and the next one goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from continual.config import HubSettings
from continual.errors import Refuse
from continual.hub import Info, Trouble
from continual.hub.answers import DoesNotFit, Misfit
from continual.hub.client import Budget
from continual.hub.locate import Places
from continual.retrying import Fault
from continual.sources.cursor import Cursor, Sieve, Sighting

PAGES = 200
"""Pages of each listing that one look reads: 200,000 models."""
SECONDS = 300.0
"""Seconds that one look takes at most, a share of them for each listing: as long as the Hub's window of requests."""
MOST_NOTES = 100
_SURVEYED = 3600.0
"""Seconds that a survey may take, which a person waits for and can end."""


class HubListing(NamedTuple):
    """A listing that is read: its name in the cursor, and the tag or the author that is asked for."""

    name: str
    tag: str | None = None
    author: str | None = None


class Polling:
    """What the settings look for, and how it is asked for. `notes`: what was seen that is no model and that a person
    should know of, by repo; `untold`: those of them that no log line told of yet."""

    def __init__(self, places: Places, asked: HubSettings, cursor: Cursor, known: Callable[[str], bool]) -> None:
        self.notes: dict[str, str] = {}
        self.untold: list[str] = []
        self._places, self._asked, self._cursor, self._known = places, asked, cursor, known
        self._sieve = Sieve(known, self._wanted)
        self._turn = 0

    @property
    def listings(self) -> list[HubListing]:
        """What is listed: the tags of the bases' relations, and the authors."""
        relations = [
            f"base_model:{relation}:{base}" for base in self._places.bases for relation in self._asked.relations
        ]
        tags = [HubListing(tag, tag=tag) for tag in relations] if self._asked.watch else []
        return tags + [HubListing(f"author:{author}", author=author) for author in self._asked.authors]

    def look(self, now: float) -> int:
        """Asks the Hub once what there is. Returns how many commits were new.

        Trouble with one listing keeps no other from being read, and is raised at the end, unless it is one that all
        have. Raises Trouble.
        """
        end = time.monotonic() + SECONDS
        new = 0
        trouble: Trouble | None = None
        listings = self.listings
        for number, listing in enumerate(listings):
            left = max(0.0, end - time.monotonic()) / (len(listings) - number + (1 if self._asked.repos else 0))
            try:
                new += self._listing(listing, now, Budget(PAGES, time.monotonic() + left))
            except Refuse as error:
                trouble = trouble or Trouble(f"{error}: is {self._places.hub.endpoint} the Hub?", Fault.REQUEST)
            except Trouble as error:
                if error.fault in (Fault.RATE, Fault.TOKEN):
                    raise
                trouble = trouble or error
        new += self._named(now, end)
        if trouble is not None:
            raise trouble
        return new

    def _listing(self, listing: HubListing, now: float, budget: Budget) -> int:
        """Reads a listing as far as it is needed, and what an earlier look left of it. Raises Refuse, Trouble."""
        cursor, name = self._cursor, listing.name
        everything = cursor.sweeps(name, now, self._asked.sweep)
        before = len(cursor.seen)
        rest = cursor.rests.get(name)

        def rows(start: str | None) -> Iterator[Info]:
            found = self._places.hub.listing(tag=listing.tag, author=listing.author, start=start, budget=budget)
            return self._fitting(found, listing, now, budget)

        cursor.read(name, rows(None), now, self._sieve, all_=everything, cut=lambda: budget.rest)
        if rest is not None and budget.rest is None and name in cursor.rests:
            try:
                cursor.read_on(name, rows(rest.page), now, self._sieve, lambda: budget.rest)
            except Refuse:
                cursor.lost(name)
            except Trouble as error:
                if error.fault is Fault.REQUEST:  # the page is too old
                    cursor.lost(name)
                raise
        return len(cursor.seen) - before

    def _fitting(
        self, rows: Iterable[Info | Misfit], listing: HubListing, now: float, budget: Budget
    ) -> Iterator[Info]:
        """The rows that fit. Of the others, one with a repo and a commit is looked at as any other, so that it gets a
        record; one without is told of."""
        for row in rows:
            if self._cursor.full:
                budget.pages = 0
            if isinstance(row, Info):
                yield row
            elif row.repo is None or row.sha is None:
                self._tell(row.repo or "a repo", f"what the Hub says of it does not fit: {row.why}")
            else:
                tags = (listing.tag,) if listing.tag else ()
                if self._wanted(Info(row.repo, row.sha, datetime.fromtimestamp(now, UTC), tags)):
                    self._cursor.saw(Sighting(row.repo, row.sha, now, 0.0), self._known)

    def _named(self, now: float, end: float) -> int:
        """Asks for the repos that the settings name, as far as there is time; the next look goes on there. Raises
        Trouble."""
        new = 0
        repos = self._asked.repos
        for _ in range(len(repos)):
            repo = repos[self._turn % len(repos)]
            if time.monotonic() > end:
                break
            self._turn += 1
            try:
                info = self._places.hub.info(repo, until=end)
            except DoesNotFit as error:
                if error.repo and error.sha:
                    new += self._cursor.saw(Sighting(error.repo, error.sha, now, 0.0), self._known)
                else:
                    self._tell(repo, str(error))
                continue
            except Refuse as error:  # not there (yet), or gated: it is asked for again, and told of once
                self._tell(repo, str(error))
                continue
            self.notes.pop(repo, None)
            found = Sighting(repo, info.sha, now, info.modified.timestamp())
            renamed = found._replace(repo=info.id)
            if self._places.left_out(info, repo) is None and not self._known(renamed.key):
                new += self._cursor.saw(found, self._known)
        return new

    def everything(self) -> Iterator[tuple[str, Info | Refuse]]:
        """All that the Hub lists for the settings, each repo once under the name it was asked for by; or why it cannot
        be had. Nothing is kept. Raises Refuse, Trouble."""
        seen = set()
        hub = self._places.hub
        for _, tag, author in self.listings:
            for row in hub.listing(tag=tag, author=author, budget=Budget(PAGES, time.monotonic() + _SURVEYED)):
                name = row.repo if isinstance(row, Misfit) else row.id
                if name is None or name in seen:
                    continue
                seen.add(name)
                if isinstance(row, Misfit):
                    yield name, Refuse("malformed", f"{name}: what the Hub says of it does not fit: {row.why}")
                else:
                    yield name, row
        for repo in self._asked.repos:
            if repo not in seen:
                try:
                    yield repo, hub.info(repo)
                except Refuse as error:
                    yield repo, error

    def _wanted(self, info: Info) -> bool:
        return self._places.left_out(info) is None

    def _tell(self, repo: str, why: str) -> None:
        if self.notes.get(repo) != why and (repo in self.notes or len(self.notes) < MOST_NOTES):
            self.notes[repo] = why
            self.untold.append(f"{repo}: {why}" if not why.startswith(repo) else why)
