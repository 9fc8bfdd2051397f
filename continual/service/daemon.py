"""The daemon: wires settings to parts, runs them in one task group, takes the signals, drains. One candidate folds at a
time, on a thread.

All waiting is on the event loop; the engine is synchronous and knows nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from continual import provenance, tuning
from continual import selection as rounds
from continual.api import Merge
from continual.config import Settings
from continual.engine.outcomes import Outcome
from continual.errors import Abandoned, Halt, Misconfigured, Retry, Skip
from continual.hub.locate import SCHEME
from continual.publish import hooks, hub
from continual.records import Entry, Event, Totals
from continual.retrying import retry_delay
from continual.selection.steps import Taken
from continual.service import logs
from continual.service.metrics import Metrics
from continual.service.outlets import Publishing
from continual.service.queue import Queue, Queued
from continual.service.status import Live
from continual.service.web import Webhook, create_app, listen, serve
from continual.sources.folder import FolderSource, forbidden
from continual.sources.hub import HubSource
from continual.texts import plain


def run(settings: Settings) -> int:
    """Runs until a signal or a Halt; returns the exit code. Raises ContinualError for what keeps it from starting."""
    logs.configure(json=settings.log_json, level=settings.log_level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the client's bars are for people, not for a log
    check_places(settings)
    with Merge(settings, write=True) as merge:
        sock = listen(settings.host, settings.port, settings.allow_remote)
        daemon = Daemon(merge, sock)
        asyncio.run(daemon.run())
        return 4 if daemon.halted else 0


def check_places(settings: Settings) -> None:
    """Refuses a configuration in which what we write would be seen as something to fold, or in which nothing is
    watched."""
    if not settings.watch and not watches_hub(settings):
        raise Misconfigured(
            "nothing to watch: name a folder with watch = [DIR] (--watch DIR), or set hub.watch = true (--hub watch=true)"
        )
    hub.check(settings.release)
    hooks.check(settings.hooks)
    ours = [settings.state] + ([settings.current.parent] if settings.current else [])
    for root in settings.watch:
        if not root.is_dir():
            raise Misconfigured(f"watch = {root}: no such directory")
        if found := forbidden(root):
            raise Misconfigured(f"watch = {root}: {found} is a state; keep states outside the watched folders")
        for place in ours:
            if place.resolve().is_relative_to(root.resolve()):
                raise Misconfigured(
                    f"{place} lies in the watched folder {root}: what is published there would be folded again; move one of them"
                )


def watches_hub(settings: Settings) -> bool:
    """Whether anything is taken from the Hub, by polling or by webhooks."""
    return settings.hub.watch or bool(settings.hub.repos or settings.hub.authors or settings.webhook_secret)


class Daemon:
    """One running service on one open state."""

    def __init__(self, merge: Merge, sock: socket.socket) -> None:
        self.merge = merge
        self.socket = sock
        self.settings = merge.settings
        self.log = structlog.get_logger("continual")
        self.metrics = Metrics()
        self.queue = Queue()
        if watches_hub(self.settings) or self.settings.release.repo:
            _ = merge.places.hub  # what keeps it from being asked is said before anything starts
        self.hub = self._hub_source() if watches_hub(self.settings) else None
        self.live = Live(merge, self.queue, self.hub)
        folders = [
            FolderSource(root, settle=self.settings.settle, rescan=self.settings.rescan) for root in self.settings.watch
        ]
        self.sources: list[FolderSource | HubSource] = [*folders, *([self.hub] if self.hub else [])]
        self.stopping = asyncio.Event()
        self.wake = asyncio.Event()
        self.halted: Halt | None = None
        self.asked: rounds.Asked | None = None
        self._round_failures, self._round_due = 0, 0.0
        self._thread = ThreadPoolExecutor(1, "engine")
        self.publishing = Publishing(merge, self.metrics, self._record, self._gauge)

    async def run(self) -> None:
        """Starts everything, waits for a signal or a Halt, and drains within the time that is set."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        engine = await asyncio.to_thread(lambda: self.merge.engine)
        if self.merge.selects != "none":
            self.asked = self.merge.asked()
            if self.asked.calibration.unsupervised:
                self.log.warning("unsupervised", message=rounds.UNSUPERVISED)
            await asyncio.to_thread(self.asked.calibration.told)  # what is missing is said at the start
        self.metrics.build(rule=self.merge.rule.name, device=str(engine.device), software=provenance.software())
        self._gauge()
        self.log.info(
            "started",
            pid=os.getpid(),
            state=str(self.settings.state),
            head=self.merge.state.ledger.head.seq,
            rule=self.merge.rule.name,
        )
        for orphan in self.merge.state.orphans:
            self.log.info("orphan removed", generation=orphan)
        served = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                web = group.create_task(self._serve(served))
                group.create_task(self._heartbeat())
                folding = group.create_task(self._folding())
                publishing = [group.create_task(task) for task in self.publishing.tasks()]
                feeding = [group.create_task(self._feed(source)) for source in self.sources]
                await self.stopping.wait()
                await self._drain(folding)
                self.merge.places.stop.set()
                for task in (*publishing, *feeding):
                    task.cancel()
                served.set()
                await web
        except* Halt as group_error:
            self._halt(_first(group_error))
        finally:
            self._thread.shutdown()
        self.log.info("stopped", head=self.merge.state.ledger.head.seq, clean=self.halted is None)

    def _signalled(self, number: int) -> None:
        if self.stopping.is_set():
            self.merge.engine.resources.stop.set()
        self.log.info("stopping", signal=signal.Signals(number).name, drain_seconds=self.settings.drain)
        self.stopping.set()
        self.wake.set()

    def _halt(self, error: Halt) -> None:
        self.halted = error
        self.metrics.error("halt")
        self.log.error("halted", error=str(error))
        self.stopping.set()
        self.wake.set()

    async def _drain(self, folding: asyncio.Task[None]) -> None:
        """Lets the fold under way finish, and gives it up where it takes longer than `drain` seconds."""
        done, _ = await asyncio.wait({folding}, timeout=self.settings.drain)
        if not done:
            self.merge.engine.resources.stop.set()
            await asyncio.wait({folding})

    async def _serve(self, stop: asyncio.Event) -> None:
        secret, webhook = self.settings.webhook_secret, None
        if secret is not None and self.hub is not None:
            webhook = Webhook(secret.get_secret_value(), self.hub.inbox, self.hub.told)
        await serve(create_app(self.live, self.metrics, plain, webhook), self.socket, self._listening, stop)

    def _listening(self, url: str) -> None:
        self.merge.state.set_url(url)
        self.live.url = url
        self.log.info("listening", url=url)

    async def _heartbeat(self) -> None:
        while not self.stopping.is_set():
            self.live.beat = time.monotonic()
            if self.hub is not None:
                client = self.merge.places.hub
                self.metrics.hub(client.requests, client.received, self.hub.polled)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), 1.0)

    def _hub_source(self) -> HubSource:
        state = self.merge.state
        self.merge.places.check()
        found = HubSource(self.merge.places, self.settings.hub, self.settings.state, state.ledger.is_settled)
        found.again(state.ledger.retried())
        return found

    async def _record(self, entry: Entry) -> None:
        """Makes a record on the thread that writes the state, after the fold under way."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.merge.state.record, entry)
        self._gauge()

    async def _feed(self, source: FolderSource | HubSource) -> None:
        async for event in source.events(self.stopping):
            if self.live.current is not None and self.live.current.key == event.key:
                continue
            self.queue.put(event)
            self.metrics.queue(len(self.queue.waiting))
            self.wake.set()

    async def _folding(self) -> None:
        """Takes one candidate after the other until told to stop; nothing begins before every source has scanned once."""
        loop = asyncio.get_running_loop()
        while not self.stopping.is_set():
            self.live.scanned = all(source.scanned.is_set() for source in self.sources)
            waiting = self.queue.take(loop.time()) if self.live.scanned else None
            if waiting is not None:
                await self._one(waiting, loop)
            elif self.live.scanned and self._round_wait(loop.time()) == 0.0:
                await self._round(loop)
            else:
                self.wake.clear()
                due = self.queue.next_due()
                waits = (self._round_wait(loop.time()), None if due is None else max(0.0, due - loop.time()))
                delay = min((wait for wait in waits if wait is not None), default=None)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), delay if self.live.scanned else 0.2)

    def _round_wait(self, now: float) -> float | None:
        """Seconds until a round is to be run, 0 where one is due, None where none is in sight."""
        if self.asked is None:
            return None
        pool, clock = self.merge.pool(), rounds.clock()
        if pool and (self.merge.state.ledger.open_round is not None or rounds.due(pool, self.asked, clock)):
            return max(0.0, self._round_due - now)
        return rounds.next_due(pool, self.asked, clock)

    async def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs a round; one that the environment kept from its end is tried again later, and goes on where it was."""
        self.live.begin_round()
        try:
            found = await loop.run_in_executor(
                self._thread, lambda: self.merge.round(self.live.progress, self._heard(loop))
            )
        except Abandoned as error:
            self.log.info("abandoned", what="round", error=str(error))
            return
        except Retry as error:
            self._round_failures += 1
            delay = retry_delay(self._round_failures)
            self._round_due = loop.time() + delay
            self.metrics.retried()
            self.log.warning("retry", what="round", error=str(error), seconds=delay)
            return
        except Halt as error:
            self._halt(error)
            return
        finally:
            self.live.end()
        self._round_failures = 0
        assert found.commit is not None
        numbers = found.commit.entry.numbers or {}
        self.metrics.round(found.seconds, len(numbers.get("folds", ())), time.time())
        fates = {
            fate: sum(row.fate == fate for row in found.rows) for fate in ("folded", "deferred", "refused", "expired")
        }
        figures = {key: round(found.numbers[key], 6) for key in ("before", "loss", "gap")}
        self.log.info("round", seq=found.commit.seq, **fates, **figures, seconds=round(found.seconds, 3))
        for row in numbers["scores"]:  # of those it chose for a rule the fold has told
            if row["fate"] in ("refused", "expired"):
                self.metrics.refused(row["reason"])
                self.log.warning(
                    row["fate"], model=row["name"], seq=found.commit.seq, reason=row["reason"], message=row["message"]
                )
        self.publishing.fresh()
        self._gauge()

    def _heard(self, loop: asyncio.AbstractEventLoop) -> rounds.Told:
        """Tells of each fold and step of a round from its thread."""

        def tell(what: Outcome | Taken) -> None:
            if isinstance(what, Outcome):
                loop.call_soon_threadsafe(self._tell, what)
            else:
                self.log.info("step", number=what.number + 1, loss=round(what.loss, 6), gap=round(what.gap, 6))

        return tell

    async def _one(self, waiting: Queued, loop: asyncio.AbstractEventLoop) -> None:
        event = waiting.event
        if not event.origin.startswith(SCHEME) and not Path(event.origin).exists():
            self.log.info("vanished", model=event.name, path=event.origin)
            return
        self.live.begin(event)
        try:
            outcome = await loop.run_in_executor(self._thread, self._consider, waiting)
        except Abandoned as error:
            self.log.info("abandoned", model=event.name, error=str(error))
            return
        except Skip as skipped:
            self.log.info("left out", model=event.name, why=str(skipped))
            self._settled(event, None)
            return
        except Retry as error:
            delay = self.queue.again(waiting, loop.time(), error.after)
            self.metrics.retried()
            self.log.warning("parked" if waiting.parked else "retry", model=event.name, error=str(error), seconds=delay)
            return
        except Halt as error:
            self._halt(error)
            return
        finally:
            self.live.end()
            self.metrics.queue(len(self.queue.waiting))
        self._settled(event, (outcome.commit.entry.candidate or {}).get("key"))
        self._tell(outcome)

    def _settled(self, event: Event, key: str | None) -> None:
        """Tells the sources what became of what they saw."""
        for source in self.sources:
            source.settled(event.key, key)

    def _consider(self, waiting: Queued) -> Outcome:
        return self.merge.fold(waiting.event, progress=self.live.progress)

    def _tell(self, outcome: Outcome) -> None:
        """One log line and the metrics of what became of a candidate."""
        facts: dict[str, Any] = {"model": outcome.name, "seq": outcome.commit.seq}
        if outcome.fate == "folded" and outcome.report is not None:
            report = outcome.report
            self.metrics.observe(report, time.time())
            numbers = {k: round(report.numbers[k], 4) for k in ("tau_norm", "cosine", "lambda") if k in report.numbers}
            self.log.info(
                "folded", **facts, **numbers, seconds=round(report.seconds["total"], 3), bytes_read=report.bytes_read
            )
            self.publishing.fresh()
        elif outcome.fate == "deferred":
            self.log.info("waits", **facts, pool=len(self.merge.pool()))
        elif outcome.fate == "known":
            self.log.debug("known", **facts, fate=outcome.commit.entry.fate)
        else:
            self.metrics.refused(outcome.reason or "unknown")
            self.log.warning(outcome.fate, **facts, reason=outcome.reason, message=outcome.message)
        self._gauge()

    def _gauge(self) -> None:
        state = self.merge.state
        self.metrics.state(
            state.generation_bytes(), len(state.generations()), state.ledger.head.seq, len(state.ledger.folds())
        )
        self.metrics.gauges(self.merge.rule.read.gauges(Totals.of(state.ledger.totals)))
        last = rounds.last_round(state)
        self.metrics.pool(len(state.ledger.pool), (last.entry.numbers or {}) if last else {})
        tuned = tuning.in_force(state)
        self.metrics.scale(self.merge.reading().factor(), (tuned.entry.numbers or {})["folds"] if tuned else 0)


def _first(group: BaseExceptionGroup[Halt]) -> Halt:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Halt)
    return found
