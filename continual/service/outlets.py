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
from typing import Literal

import structlog

from continual.api import Merge
from continual.errors import ContinualError, Misconfigured, Retry
from continual.hub import Trouble
from continual.publish.hooks import Published
from continual.retrying import PARKED, Fault, retry_delay
from continual.service import publishing
from continual.service import release as releasing
from continual.service.aside import Recorder, aside
from continual.service.failures import Failures, contained, told
from continual.service.outgoing import OutPlan, outgoing
from continual.service.telling import Telling

HOPELESS = (Fault.TOKEN, Fault.DENIED, Fault.REQUEST)
"""Faults of the Hub that only a person can mend."""
What = Literal["publish", "release"]
Outlet = tuple[What, str | None]
"""What is kept: the link `current` (`publish`) or the release, of a view or (None) of the merge."""


class Outlets:
    """Everything that follows a fold. `told` is called when something was published."""

    def __init__(self, merge: Merge, failures: Failures, record: Recorder, told: Callable[[], None]) -> None:
        self.merge = merge
        self.metrics = failures.metrics
        self.health = failures.health
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
            out = outgoing(settings, name)
            found += [("publish", name)] if out.current is not None else []
            found += [("release", name)] if out.asked.repo is not None else []
        return found

    async def _keep(self, outlet: Outlet) -> None:
        """Publishes the newest model whenever there is another one, as long as the settings want it."""
        what, name = outlet
        which = f"view {name}" if name else what
        do: Callable[[OutPlan, int], Awaitable[bool]] = self._publish if what == "publish" else self._release
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
                if await do(outgoing(self.merge.settings, name), model.seq):
                    fresh.set()
                failures = 0
                self.health.works(what, which)
                self.told()
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

    async def _publish(self, out: OutPlan, seq: int) -> bool:
        """Points a link at an export of record `seq`, and hands it to the hooks. Never more to do."""
        served = self.telling.served(out.name)
        whole = out.as_lora is None
        putting = partial(publishing.put, self.merge, out, seq, None if whole else served)
        found = await asyncio.to_thread(contained(putting))
        if found is None:
            return False
        if found.new:
            self._log.info("published", **_of(out), seq=found.seq, directory=str(found.directory))
        published = Published(
            state=self.merge.state.id, seq=found.seq, view=out.name, directory=found.directory, mark=found.mark
        )
        if not self.telling.waits(published, "current"):
            return False
        adapter: Path | None = found.directory
        if whole:
            rank = self.telling.rank(out.name)
            adapter = None
            if rank is not None:
                beside = partial(publishing.put_beside, self.merge, out, seq, found.mark, rank, served or set())
                adapter = await asyncio.to_thread(contained(beside))
        self.telling.hand(dataclasses.replace(published, lora=adapter), "current")
        return False

    async def _release(self, out: OutPlan, newest: int) -> bool:
        """Releases the newest record that changed the model; where every one is wanted, the next after the last that
        was released. Whether there are more."""
        state = self.merge.state
        done = state.publications.release(out.asked.repo or "", out.asked.branch)
        seq = newest
        if out.asked.every and state.ledger.folds(newest) and (done is None or done.of < newest):
            seq = releasing.next_record(self.merge, -1 if done is None else done.of)
        if await asyncio.to_thread(contained(partial(releasing.is_out, self.merge, out, seq, done))):
            if done is not None:  # a kill may have come between the release and its hooks
                was = Published(state=state.id, seq=done.of, repo=done.repo, commit=done.commit, tag=done.tag)
                self.telling.hand(dataclasses.replace(was, view=out.name, mark=done.mark), "release")
            return False
        found = await aside(partial(releasing.release, self.merge, seq, view=out.name, wait=True))
        if done is None or (done.of, done.mark) != (found.seq, found.mark):
            await self.record(releasing.entry(found, out.name))
            self.metrics.released(found.uploaded)
        self._log.info(
            "released",
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
        self.telling.hand(dataclasses.replace(facts, view=out.name, mark=found.mark), "release")
        return seq < newest


def _of(out: OutPlan) -> dict[str, str]:
    """The view, for a line of the log."""
    return {"view": out.name} if out.name else {}


def again_after(error: Exception, failures: int) -> float:
    """Seconds until a release that failed for the `failures`-th time is tried again: as any other failure, never before
    a server asked for; what only a person can mend is tried once an hour, and with the next fold."""
    hopeless = isinstance(error, Misconfigured) or (isinstance(error, Trouble) and error.fault in HOPELESS)
    after = error.after if isinstance(error, Retry) else 0.0
    return retry_delay(failures, max(PARKED if hopeless else 0.0, after))
