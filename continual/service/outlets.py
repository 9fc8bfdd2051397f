"""What the daemon keeps on the newest merge, and on each view of it: the link `current`, the release on the Hub, and
the servers that are told. Tasks of their own: none holds up a fold.

Each outlet does one thing at a time; what is folded meanwhile is made up for by the next. One that failed is tried
again after a delay that doubles, or with the next fold.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog

from continual.api import Merge
from continual.errors import Abandoned, ContinualError, Misconfigured, Retry
from continual.hub import Trouble
from continual.publish.published import Published
from continual.retrying import PARKED, Fault, retry_delay
from continual.service import publishing
from continual.service import release as releasing
from continual.service.aside import Recorder, aside
from continual.service.canary import reporting, stages
from continual.service.canary.stages import Step
from continual.service.failures import Failures, contained, told
from continual.service.outgoing import OutPlan, What, outgoing
from continual.service.telling import Telling
from continual.state.canaries import Phase

HOPELESS = (Fault.TOKEN, Fault.DENIED, Fault.REQUEST)
"""Faults of the Hub that only a person can mend."""
Outlet = tuple[What, str | None]
"""What is kept: the link `current` (`publish`) or the release, of a view or (None) of the merge."""


class Outlets:
    """Everything that follows a fold. `told` is called when something was published."""

    def __init__(
        self,
        merge: Merge,
        failures: Failures,
        record: Recorder,
        told: Callable[[], None],
        turned: Callable[[str | None], None] = lambda _name: None,
    ) -> None:
        """`turned` is called with a view, or (None) the merge, whose canary has come further."""
        self.merge = merge
        self._turned = turned
        self.metrics = failures.metrics
        self.health = failures.health
        self._news = failures.news
        self._tracing = failures.tracing
        self.record = record
        self.told = told
        self.telling = Telling(merge, failures, record)
        self._log = structlog.get_logger("continual")
        self._fresh: dict[Outlet, asyncio.Event] = {}
        self._changed = asyncio.Event()

    def fresh(self) -> None:
        """Hears that the merged model is another one."""
        for event in self._fresh.values():
            event.set()

    def reloaded(self) -> None:
        """Hears that the settings are others: views may have come or gone, or be put out otherwise."""
        self._changed.set()
        self.fresh()

    async def run(self) -> None:
        """Keeps everything that the settings name; ends when it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for task in self.telling.tasks():
                group.create_task(task)
            while True:
                for outlet in self._wanted():
                    if outlet not in self._fresh:
                        self._fresh[outlet] = asyncio.Event()
                        group.create_task(self._keep(outlet))
                await self._changed.wait()
                self._changed.clear()

    def _wanted(self) -> list[Outlet]:
        settings = self.merge.settings
        found: list[Outlet] = []
        for name in (None, *settings.views):
            found += [(what, name) for what in outgoing(settings, name).outlets]
        return found

    async def _keep(self, outlet: Outlet) -> None:
        """Publishes the newest model whenever there is another one, as long as the settings want it."""
        what, name = outlet
        which = f"view {name}" if name else what
        fresh = self._fresh[outlet]
        fresh.set()
        failures = 0
        while True:
            await fresh.wait()
            fresh.clear()
            if outlet not in self._wanted():
                del self._fresh[outlet]
                self.health.works(what, which)
                self.telling.forget(name)
                self._log.info("no longer published", what=which, hint="what is out stays as it is")
                return
            model = self.merge.state.ledger.model
            if model is None:
                continue
            try:
                if await self._put_out(outlet, model.seq):
                    fresh.set()
                failures = 0
                self.health.works(what, which)
                self.told()
            except Abandoned as error:
                self._log.info("abandoned", what=which, error=str(error))
                return
            except Exception as error:  # whatever it is, the folds go on
                failures += 1
                delay = again_after(error, failures) if what == "release" else retry_delay(failures)
                self.metrics.error(what)
                self.health.fails(what, which, told(error))
                known = isinstance(error, OSError | ContinualError)
                trace = None if known else error
                more = {"what": which} if name else {}
                self._log.error(
                    f"{what} failed", seq=model.seq, error=told(error), retry_seconds=delay, exc_info=trace, **more
                )
                asyncio.get_running_loop().call_later(delay, fresh.set)

    async def _put_out(self, outlet: Outlet, newest: int) -> bool:
        """Puts record `newest` out, or where there is a canary what it says. Whether there is more to do."""
        what, name = outlet
        out = outgoing(self.merge.settings, name)
        do: Callable[[OutPlan, int, str], Awaitable[bool]] = self._publish if what == "publish" else self._release
        if out.canary is None:
            return await do(out, newest, "current" if what == "publish" else "release")
        found = await asyncio.to_thread(contained(partial(stages.step, self.merge, name, newest)))
        if found is None:
            self._turned(name)
            return False
        after = found.after if found.after == "candidate" or what == "publish" else "release"
        await do(found.out, found.seq, after)
        await self._turn(outlet, found)
        return False

    async def _turn(self, outlet: Outlet, made: Step) -> None:
        """What follows for a canary from what was put out of it."""
        what, name = outlet
        phase: Phase = "goes out" if made.after == "candidate" else "promoted"
        turn = partial(stages.done, self.merge, name, what, made.seq, phase)
        record = await asyncio.to_thread(contained(turn))
        if record is not None and stages.is_everywhere(self.merge, record):
            if (entry := stages.verdict(self.merge, record)) is not None:
                await self.record(entry)
                self.metrics.canary_ended("promoted")
                of = f" of the view {name}" if name else ""
                self._news("canary", f"record {record.seq}{of} was a canary, and is promoted: {record.why}")
                self._log.info("promoted", **_of(outgoing(self.merge.settings, name)), seq=record.seq, why=record.why)
            self.merge.state.canaries.rest(name, record.seq)
            self.fresh()  # what was folded meanwhile is the next canary
        self._turned(name)

    async def _publish(self, out: OutPlan, seq: int, after: str) -> bool:
        """Points a link at an export of record `seq`, and hands it to the hooks. Never more to do."""
        served = self.telling.served(out.name, after)
        whole = out.as_lora is None

        def putting() -> publishing.Put | None:
            with self._tracing.staged("export", seq=seq, view=out.name):
                return publishing.put(self.merge, out, seq, None if whole else served)

        found = await asyncio.to_thread(contained(putting))
        if found is None:
            return False
        if out.name is None and after != "candidate":
            self.metrics.published(found.seq)
        if found.new:
            said = "canary out" if after == "candidate" else "published"
            self._log.info(said, **_of(out), seq=found.seq, directory=str(found.directory))
        published = Published(
            state=self.merge.state.id, seq=found.seq, view=out.name, directory=found.directory, mark=found.mark
        )
        if not self.telling.waits(published, after):
            return False
        adapter: Path | None = found.directory
        if whole:
            rank = self.telling.rank(out.name, after)
            adapter = None
            if rank is not None:
                beside = partial(publishing.put_beside, self.merge, out, seq, found.mark, rank, served or set())
                adapter = await asyncio.to_thread(contained(beside))
        self.telling.hand(dataclasses.replace(published, lora=adapter), after)
        return False

    async def _release(self, out: OutPlan, newest: int, after: str) -> bool:
        """Releases the newest record that changed the model; where every one is wanted, the next after the last that
        was released. Whether there are more."""
        state = self.merge.state
        if out.request:
            return await self._propose(out, newest, after)
        done = state.publications.release(out.asked.repo or "", out.asked.branch)
        seq = newest
        if out.asked.every and state.ledger.folds(newest) and (done is None or done.of < newest):
            seq = releasing.next_record(self.merge, -1 if done is None else done.of)
        if await asyncio.to_thread(contained(partial(releasing.is_out, self.merge, out, seq, done))):
            if done is not None:  # a kill may have come between the release and its hooks
                was = Published(state=state.id, seq=done.of, repo=done.repo, commit=done.commit, tag=done.tag)
                self.telling.hand(dataclasses.replace(was, view=out.name, mark=done.mark), after)
            return False
        with self._tracing.span("release", seq=seq, view=out.name):
            found = await aside(partial(releasing.release_as, self.merge, out, seq, wait=True))
        if done is None or (done.of, done.mark) != (found.seq, found.mark):
            await self.record(releasing.entry(found, out.name))
            self.metrics.released(found.uploaded)
            self._news("released", f"record {found.seq} is on the Hub as {found.repo} ({found.tag or found.commit})")
        self._log.info(
            "canary out" if after == "candidate" else "released",
            **_of(out),
            seq=found.seq,
            repo=found.repo,
            commit=found.commit,
            tag=found.tag,
            uploaded_bytes=found.uploaded,
            new=found.new,
        )
        facts = Published(
            state=state.id, seq=found.seq, repo=found.repo, commit=found.commit, url=found.url, tag=found.tag
        )
        self.telling.hand(dataclasses.replace(facts, view=out.name, mark=found.mark), after)
        return seq < newest

    async def _propose(self, out: OutPlan, seq: int, after: str) -> bool:
        """Has record `seq` proposed by a pull request where it is a canary, and else none that is open."""
        state = self.merge.state
        record = await asyncio.to_thread(contained(partial(state.canaries.get, out.name)))
        if record is None or record.seq != seq:
            last = state.publications.verdict(out.name)
            why = "It is promoted." if last is None or last.canary.verdict == "promoted" else last.canary.why
            closed = await aside(partial(releasing.close_requests, self.merge, out, seq, why))
            self._log.info("requests closed", **_of(out), repo=out.asked.repo, numbers=closed) if closed else None
            return False
        if record.request is None:
            found = await aside(partial(reporting.propose, self.merge, record))
            if state.publications.release(found.repo, found.branch) is None:
                await self.record(releasing.entry(found, out.name))
                self.metrics.released(found.uploaded)
            self._log.info("proposed", **_of(out), seq=seq, repo=found.repo, url=found.url, new=found.new)
        done = await asyncio.to_thread(contained(partial(state.canaries.get, out.name)))
        if done is not None and done.request is not None:
            facts = Published(state=state.id, seq=seq, repo=out.asked.repo, commit=done.commit)
            self.telling.hand(dataclasses.replace(facts, view=out.name, mark=record.mark), after)
        return False


def _of(out: OutPlan) -> dict[str, str]:
    """The view, for a line of the log."""
    return {"view": out.name} if out.name else {}


def again_after(error: Exception, failures: int) -> float:
    """Seconds until a release that failed for the `failures`-th time is tried again: as any other failure, never before
    a server asked for; what only a person can mend is tried once an hour, and with the next fold."""
    hopeless = isinstance(error, Misconfigured) or (isinstance(error, Trouble) and error.fault in HOPELESS)
    after = error.after if isinstance(error, Retry) else 0.0
    return retry_delay(failures, max(PARKED if hopeless else 0.0, after))
