"""The daemon: wires settings to parts, runs them in one task group, takes the signals, drains.

All waiting is on the event loop; the engine is synchronous, runs on a thread, and knows nothing of it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import structlog

from continual import gates, lazily
from continual.api import Merge
from continual.config import Settings
from continual.errors import Halt
from continual.gates import SignatureGate
from continual.hub import must_be_online
from continual.publish import bom, hub
from continual.records import Candidate
from continual.service import gauging, logs, notifying, signals, telling, tracing, view_settings
from continual.service.canary.calling import Calling
from continual.service.canary.watching import CanaryWatch
from continual.service.control.acting import Answer
from continual.service.control.answering import Control
from continual.service.control.parley import Hearing
from continual.service.control.performing import Performing
from continual.service.control.requests import DrainRequest, Request
from continual.service.failures import Failures
from continual.service.feeding import feed
from continual.service.metrics import Metrics
from continual.service.notifying import Notifier
from continual.service.outlets import Outlets
from continual.service.queue import Queue
from continual.service.reloading import Reloading
from continual.service.status import Live
from continual.service.supervised import Supervisor
from continual.service.tracing import Tracing
from continual.service.watched import sources_of
from continual.service.web import Commanding, Ears, create_app, listen, serve
from continual.service.worker import Worker
from continual.signing import signer as signing
from continual.sources import roster
from continual.sources.contract import Listening, Source
from continual.sources.hub import HubSource
from continual.stores import here

_BEAT = 1.0
"""Seconds between two signs of life."""
_ENDING = 60.0
"""Seconds that the service manager is asked to wait after `drain`: until a tensor is done, and connections end."""


def run(settings: Settings, read: Callable[[], Settings] | None = None) -> int:
    """Runs until a signal or a Halt; returns the exit code. `read` reads the settings again. Raises ContinualError for
    what keeps it from starting."""
    supervisor = Supervisor.of(os.environ)
    logs.configure(json=settings.log_json, level=settings.log_level, file=settings.log_file)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the client's bars are for people, not for a log
    check(settings)
    lazily.load()  # before the first fold, and on this thread
    with Merge(settings, write=True) as merge:
        view_settings.must_be_readable(merge)
        gc.freeze()  # the modules and the records stay as long as the process: nobody looks through them for garbage
        gc.enable()
        sock = listen(settings.host, settings.port, allow_remote=settings.allow_remote)
        if settings.release.repo or any(view.repo for view in settings.views.values()):
            must_be_online()
        daemon = Daemon(merge, sock, sources_of(merge), read, supervisor)
        asyncio.run(daemon.run())
        return 4 if daemon.halted else 0


def check(settings: Settings) -> None:
    """Raises Misconfigured for settings that cannot work: nothing is watched, or something that cannot be, or what is
    published has nowhere to go."""
    roster.must_watch(settings)
    hub.check(settings.release)
    view_settings.check(settings)
    signing.check(settings.signing)
    if settings.bom:
        bom.check()
    gates.make(settings).the(SignatureGate).check()
    telling.check(settings)
    notifying.check(settings.notify)
    tracing.check(settings)
    roster.check(settings)


class Daemon:
    """One running service on one open state. `halted` says why a person has to look."""

    def __init__(
        self,
        merge: Merge,
        sock: socket.socket,
        sources: Sequence[Source],
        read: Callable[[], Settings] | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.merge = merge
        self._supervisor = supervisor or Supervisor()
        self.settings = merge.settings
        self.sources = sources
        self.halted: Halt | None = None
        self.metrics = Metrics()
        self.live = Live(merge, Queue(), sources)
        gauging.begin(self.metrics, merge)
        self._failures = Failures(self.metrics, self.live.health, Tracing(merge.settings))
        self._notifier = Notifier(merge.settings.notify, merge.state.path, self._failures)
        self._failures.news = self._notifier.hear
        self._socket = sock
        self._log = structlog.get_logger("continual")
        self._stopping = asyncio.Event()
        self._draining = 0
        self._worker = Worker(merge, self.live, self._failures, fresh=self._fresh, halt=self._halt)
        worker = self._worker
        self._watch = CanaryWatch(merge, self._failures, worker.turns, self._fresh, self._again)
        for source in sources:
            if isinstance(source, HubSource):
                source.heard = self._watch.heard
        self._performing = Performing(merge, self.live, worker.turns, worker.record, sources, self._fresh)
        self._outlets = Outlets(merge, self._failures, worker.record, worker.gauge, self._watch.turned)
        self._reloading = Reloading(merge, worker.turns, read, sources, self._reloaded, self._supervisor)
        self._control = Control(here(merge.state.path), self._perform, lambda: self.live.doing)

    async def run(self) -> None:
        """Starts everything, waits for a signal or a Halt, and drains within the time that is set."""
        with signals.taken(self._signalled, self._reloading.ask):
            asyncio.get_running_loop().set_exception_handler(self._stray)
            await self._worker.prepare()
            await self._watch.prepare()
            self._log_start()
            try:
                await self._run_tasks()
            except* Halt as group_error:
                self._halt(_first(group_error))
            finally:
                self._worker.close()
            await self._notifier.last()
            await asyncio.to_thread(self._failures.tracing.end)
            self._log.info("stopped", head=self.merge.head, clean=self.halted is None)

    async def _run_tasks(self) -> None:
        served = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            web = group.create_task(self._serve(served))
            control = group.create_task(self._control.serve(served))
            beating = group.create_task(self._heartbeat())
            folding = group.create_task(self._worker.run(self.sources, self._stopping))
            publishing = group.create_task(self._outlets.run())
            watching = group.create_task(self._watch.run())
            notifying = group.create_task(self._notifier.run())
            looking = group.create_task(gauging.measure(self.merge, self.live, self._failures))
            feeding = [group.create_task(self._feed(source)) for source in self.sources]
            await self._stopping.wait()
            await self._drain(folding)
            self.merge.give_up()
            for task in (beating, publishing, watching, *feeding, looking, notifying):
                task.cancel()
            served.set()
            await asyncio.wait({web, control})

    def _log_start(self) -> None:
        merge = self.merge
        state = str(self.settings.state)
        self._log.info("started", pid=os.getpid(), state=state, head=merge.head, rule=merge.rule.name)
        for orphan in merge.state.orphans:
            self._log.info("orphan removed", generation=orphan)

    def _fresh(self) -> None:
        self._outlets.fresh()

    def _reloaded(self) -> None:
        gauging.begin(self.metrics, self.merge)
        self._outlets.reloaded()
        self._watch.reloaded()

    def _again(self, candidates: list[Candidate]) -> None:
        for source in self.sources:
            source.again(candidates)

    def _stray(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Tells of what was raised where nobody waited for it."""
        error = context.get("exception")
        if isinstance(error, BaseException):
            self._failures.tell(error, what=str(context.get("message")))
        else:
            self._log.warning("event loop", message=str(context.get("message")))

    async def _feed(self, source: Source) -> None:
        """Fills the queue. Damage of the state, of which alone a source may stop the daemon, does so."""
        try:
            await feed(source, self._worker.put, self._failures, self._stopping)
        except Halt as error:
            self._halt(error)

    async def _perform(self, request: Request, hear: Hearing, by: str = "") -> Answer:
        """Does what somebody asks for over the control socket, or (`by` says who) over the web."""
        if not isinstance(request, DrainRequest):
            return await self._performing.perform(request, hear, by)
        loop = asyncio.get_running_loop()
        self._draining += 1
        self.live.ending = self.live.ending or "stops when what is under way has ended, as 'continual drain' asked"
        try:
            # from its turn on that thread, so that it stops before the next fold is begun
            await self._worker.turns.ask(request.title, lambda: loop.call_soon_threadsafe(self._drained))
        except BaseException:
            self._draining -= 1
            if not self._draining and not self._stopping.is_set():  # who asked has gone: it goes on
                self.live.ending = ""
            raise
        return {"pid": os.getpid()}

    def _drained(self) -> None:
        """Stops after the fold under way, however long that takes: at a turn between two."""
        self._log.info("stopping", command="drain")
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._supervisor.stopping(self.merge.settings.drain + _ENDING)
        self.merge.places.hurry.set()  # a server that trickles does not use up the time to drain
        self._worker.wake()

    def _signalled(self, number: int) -> None:
        """Stops; a second signal gives up the fold under way at once."""
        name, drain = signal.Signals(number).name, self.merge.settings.drain
        if self._stopping.is_set():
            self._give_up()
        else:
            until = f"{datetime.now(UTC) + timedelta(seconds=drain):%H:%M:%S}Z"
            self.live.ending = f"stops on {name}: what is under way has until {until} to end, and is given up then"
        self._log.info("stopping", signal=name, drain_seconds=drain)
        self._stop()

    def _give_up(self) -> None:
        """Has what is under way end now, here and on a cluster."""
        self.live.ending = "stops: what is under way is given up, and begins again at the next start"
        self.merge.give_up()

    def _halt(self, error: Halt) -> None:
        self.halted = error
        self.live.ending = f"stops: {error}"
        self.metrics.error("halt")
        self._log.error("halted", error=str(error))
        self._failures.news("halted", f"has stopped, and a person has to look: {error}")
        self._stop()

    async def _drain(self, folding: asyncio.Task[None]) -> None:
        """Lets the fold under way finish, and gives it up where it takes longer than `drain` seconds."""
        done, _ = await asyncio.wait({folding}, timeout=self.merge.settings.drain)
        if not done:
            self._give_up()
            await asyncio.wait({folding})

    async def _serve(self, stop: asyncio.Event) -> None:
        routes = [route for source in self.sources if isinstance(source, Listening) for route in source.routes()]
        routes += Calling(self.merge, self._fresh).routes()
        names = [*self.settings.allowed_hosts, self.settings.host]
        token = self.settings.admin_token
        identity = self.merge.state.id[:8]
        commanding = None if token is None else Commanding(token.get_secret_value(), identity, self._perform)
        app = create_app(self.live, self.metrics, routes, names, commanding)
        ears = Ears(self.metrics.dropped, lambda error: self._failures.tell(error, "page", what="a page"))
        await serve(app, self._socket, self._listening, stop, ears)

    def _listening(self, url: str) -> None:
        self.merge.announce(url)
        self.live.url = url
        self._log.info("listening", url=url)
        self._supervisor.ready()

    async def _heartbeat(self) -> None:
        """Goes on while the daemon drains: a fold may take its time then."""
        while True:
            self.live.beat()
            self._supervisor.alive(self.live.line())
            try:
                for source in self.sources:
                    self.metrics.source(source.series())
                self.metrics.under_way(self.live.done)
                shortfalls = self.live.shortfalls()
                self.metrics.degraded({short.reason for short in shortfalls})
                self._notifier.degraded(shortfalls)
            except Exception as error:
                self._failures.tell(error, what="the heartbeat")
            await asyncio.sleep(_BEAT)


def _first(group: BaseExceptionGroup[Halt]) -> Halt:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Halt)
    return found
