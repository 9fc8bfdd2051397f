"""The source of fine-tunes on the Hugging Face Hub: it polls, with a cursor that is kept on disk, and hears at once of
what a webhook pushes. Whether a repo is any good is for the gates.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from continual.config import HubSettings, Settings
from continual.errors import Refuse, Retry
from continual.hub import Info, Trouble, must_be_online
from continual.records import SCHEME, Candidate, Event
from continual.retrying import Fault, next_poll
from continual.sources.contract import Sight, Source, SourceKind, SourceReport, Wiring
from continual.sources.cursor import Cursor, Sighting
from continual.sources.polling import Polling
from continual.sources.waiting import first
from continual.sources.webhook import Webhook
from continual.state.inbox import Inbox, PushRecord, load_cursor, name_of, save_cursor

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

_FIRST_LOOK = 30.0
"""Seconds after which nobody waits any more for the end of the first look."""


class HubSource(Source):
    """Polls what the settings name, and takes what the inbox holds. `heard`: what is called with the repo of every
    delivery of a webhook."""

    name = "hub"
    parks = True

    def __init__(self, wiring: Wiring, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells the seconds since 1970."""
        self.scanned = asyncio.Event()
        self.problem: str | None = None
        self.inbox = Inbox(wiring.state)
        self.cursor = Cursor.of(load_cursor(wiring.state, self.name), _word(wiring.settings.hub, wiring.places.bases))
        self._places = wiring.places
        self._asked = wiring.settings.hub
        self._secret = wiring.settings.webhook_secret
        self._state = wiring.state
        self._clock = clock
        self._fate = wiring.known
        self.heard: Callable[[str], None] = lambda _repo: None
        self._pushed = asyncio.Event()
        self._names: dict[str, list[str]] = {}
        self._settled: deque[tuple[str, str | None]] = deque()
        self._retried = deque((candidate, "retry") for candidate in wiring.retried)
        self._retried.extend((candidate, self.name) for candidate in wiring.reopened)
        self._failures = 0
        self._refused = 0
        self._due = 0.0
        self._skipped: set[str] = set()
        self._log = structlog.get_logger("continual")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._polling = Polling(wiring.places, self._asked, self.cursor, self._known)
        self._places.newer = self._came_after
        self._take_up()

    def _known(self, key: str) -> bool:
        return key in self._skipped or self._fate(key)

    @property
    def polls(self) -> bool:
        """Whether there is anything to ask the Hub for; if not, only pushes are taken."""
        return self._asked.watch or bool(self._asked.repos or self._asked.authors)

    def again(self, candidates: Sequence[Candidate]) -> None:
        """Takes up the candidates that a person wants looked at again: no listing may ever show them as new."""
        self._retried.extend((candidate, "retry") for candidate in candidates)
        self._pushed.set()

    def reopen(self, candidates: Sequence[Candidate]) -> None:
        """Takes up candidates that were refused by settings which have changed, as if a listing had shown them: what
        the settings of the Hub leave out now stays out, and the commit has to be the newest."""
        self._retried.extend((candidate, self.name) for candidate in candidates)
        self._pushed.set()

    def _take_up(self) -> None:
        while self._retried:
            candidate, by = self._retried.popleft()
            if candidate.origin.startswith(SCHEME) and candidate.revision:
                repo = candidate.origin.removeprefix(SCHEME)
                sighting = Sighting(repo, candidate.revision, self._clock(), 0.0, by)
                self.cursor.seen[sighting.key] = sighting

    def routes(self) -> list[BaseRoute]:
        """`POST /webhook`, where there is a secret."""
        from starlette.routing import Route

        if self._secret is None:
            return []
        webhook = Webhook(self._secret.get_secret_value(), self.inbox, self.told, lambda repo: self.heard(repo))
        return [Route("/webhook", webhook.answer, methods=["POST"])]

    def told(self) -> None:
        """Hears that the inbox has something new. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(self._pushed.set)

    def settled(self, event: Event, key: str | None) -> None:
        """Keeps in mind that a repo which it gave is settled under `key`, or left out by the settings (None). From any
        thread."""
        self._settled.append((event.key, key))
        self._pushed.set()

    def forget(self) -> None:
        """Forgets what `settled` heard of, and removes its pushes; not in `settled` itself, because a poll may go on on
        another thread. Raises Retry."""
        while self._settled:
            given, key = self._settled.popleft()
            name = f"hub:{given.removeprefix(SCHEME)}"
            mine = name if "@" in name else f"{name}@"
            if key is None and not mine.endswith("@"):
                self._skipped.add(mine)
            for found in {mine, key or mine}:
                self.cursor.done(found)
                for push in self._names.pop(found, []):
                    self.inbox.remove(push)

    def _came_after(self, head: Info) -> None:
        """Keeps the commit that came after a superseded one as a push, before the refusal is recorded: no listing or
        push may have told of it. From any thread."""
        self.inbox.put(name_of(head.id, head.sha), PushRecord(head.id, head.sha, self._clock()))
        self.told()

    async def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        """Repos that had no new commit for the settle time, until `stop` is set. Raises Damaged where the inbox is."""
        self._loop = asyncio.get_running_loop()
        self.cursor.prune(self._known)
        while not stop.is_set():
            self._pushed.clear()
            self._take_up()
            try:
                self.forget()
                self.open_inbox()
            except Retry as error:  # the disk: what is settled is forgotten at the next start
                self._log.warning("inbox", error=str(error))
            if self.polls and self._clock() >= self._due:
                await self._poll()
            for sighting in self.cursor.ready(self._clock(), self._asked.settle):
                yield event_of(sighting)
            self.scanned.set()  # a Hub that cannot be reached holds up no folder
            soon = self.cursor.next_ready(self._clock(), self._asked.settle)
            wait = max(0.0, self._due - self._clock()) if self.polls else 3600.0
            await first(min(wait, wait if soon is None else soon + 0.01), stop, self._pushed)

    async def _poll(self) -> None:
        """Polls on a thread, and says when the next poll is due."""
        after = 0.0
        polling = asyncio.create_task(asyncio.to_thread(self.poll))
        polling.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may wait for it any more
        try:
            await asyncio.wait({polling}, timeout=_FIRST_LOOK)
            self.scanned.set()  # a Hub that takes its time holds up no folder
            await polling
            self._failures = 0
            self._refused = 0
            self.problem, self.denied = None, False
        except Retry as error:
            after = error.after
            self.problem = str(error)
            self._failures += 1
            self.denied = isinstance(error, Trouble) and error.fault is Fault.TOKEN
            self._refused = self._refused + 1 if self.denied else 0
            self._log.warning("poll failed", error=str(error), failures=self._failures)
        while self._polling.untold:
            self._log.warning("left out", why=self._polling.untold.pop(0))
        wait = next_poll(self._asked.poll, self._failures, random.random(), after=after, refused=self._refused)
        self._due = self._clock() + wait

    def ready(self) -> list[Event]:
        """Polls, opens the inbox, and returns the repos that have been still long enough. Raises Retry, Halt."""
        self.poll()
        self.open_inbox()
        return [event_of(sighting) for sighting in self.cursor.ready(self._clock(), self._asked.settle)]

    def finish(self) -> None:
        """Forgets what is settled, and keeps how far it has come. Raises Retry."""
        self.forget()
        self.save()

    def survey(self) -> Iterator[Sight]:
        """Everything the Hub lists for the settings, wanted or not. Raises Misconfigured, Trouble."""
        now = self._clock()
        rows = self._polling.everything()
        self._places.newer = _nobody  # nothing is changed
        for called, found in rows:
            if isinstance(found, Refuse):
                yield Sight(Event("hub", f"{SCHEME}{called}"), left_out=str(found))
                continue
            young = self._asked.settle - (now - found.modified.timestamp())
            yield Sight(
                Event("hub", f"{SCHEME}{found.id}", revision=found.sha),
                key=f"hub:{found.id}@{found.sha}",
                left_out=self._places.left_out(found, called),
                waits=f"{found.id}: is looked at in {young:.0f} s, if it has no new commit until then"
                if young > 0
                else None,
            )

    def notes(self) -> Sequence[str]:
        """The repos of which the Hub says what does not fit, and those that are named and cannot be had."""
        return [why if why.startswith(repo) else f"{repo}: {why}" for repo, why in list(self._polling.notes.items())]

    def key(self, event: Event) -> str | None:
        """The repo and the commit, where that is known."""
        return None if event.revision is None else f"hub:{event.name}@{event.revision}"

    def report(self) -> SourceReport:
        """The bases, repos and authors it asks for, and what came of it."""
        looked_for = [*(self._places.bases if self._asked.watch else ()), *self._asked.repos, *self._asked.authors]
        at = self.cursor.polled
        polled = None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
        return SourceReport(tuple(looked_for), polled, self.problem, len(self.cursor.seen))

    def series(self) -> dict[str, float]:
        """Requests and bytes of the process, and the time of the last poll."""
        polled = self.cursor.polled if self.polls else None
        return {
            "continual_hub_requests_total": self._places.hub.requests,
            "continual_hub_received_bytes_total": self._places.hub.received,
        } | ({} if polled is None else {"continual_hub_last_poll_timestamp_seconds": polled})

    def save(self) -> None:
        """Keeps on disk how far this source has come. Raises Retry."""
        self.cursor.prune(self._known)
        save_cursor(self._state, self.name, self.cursor.body())

    def poll(self) -> int:
        """Asks the Hub once what there is. Returns how many commits were new; they are on disk by then. Raises Retry,
        of the Hub or the disk."""
        try:
            found = self._polling.look(self._clock())
            self.cursor.polled = self._clock()
            return found
        finally:
            self.save()

    def open_inbox(self) -> None:
        """Takes the pushes that came since the last look, and removes those of commits that are settled. Raises Retry,
        Damaged."""
        named = {push for pushes in self._names.values() for push in pushes}
        for push, came in self.inbox.items(named).items():
            sighting = Sighting(came.repo, came.sha, came.time, came.time, "webhook")
            if sighting.sha is not None and self._known(sighting.key):
                self.inbox.remove(push)
                continue
            self._names.setdefault(sighting.key, []).append(push)
            self.cursor.saw(sighting, self._known)


def _word(asked: HubSettings, bases: Sequence[str]) -> str:
    """A hash of the settings that say what is looked for and what is left out."""
    what = asked.model_dump(exclude={"read", "poll", "sweep", "settle"}, mode="json") | {"bases": list(bases)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def event_of(sighting: Sighting) -> Event:
    """The event of a sighting."""
    order = (int(sighting.modified * 1e9), sighting.repo)
    return Event(sighting.by, f"{SCHEME}{sighting.repo}", order, None, sighting.sha)


def _nobody(_info: Info) -> None:
    """Nobody wants to know of a newer commit."""


def _wanted(settings: Settings) -> bool:
    """Whether anything is taken from the Hub: by polling, or by pushes, which need the webhook's secret."""
    asked = settings.hub
    return asked.watch or bool(asked.repos or asked.authors or settings.webhook_secret)


def _make(wiring: Wiring) -> list[HubSource]:
    wiring.places.check()
    must_be_online()
    return [HubSource(wiring)]


KIND = SourceKind(name="hub", title="the Hub", make=_make, wanted=_wanted)
