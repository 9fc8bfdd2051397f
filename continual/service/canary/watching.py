"""The daemon's watch over canaries: a task for each view and for the merge, which measures when it is time, and has
what failed taken back on the thread that writes the state."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import structlog

from continual.api import Merge
from continual.errors import ContinualError
from continual.records import Candidate
from continual.retrying import retry_delay
from continual.service.aside import aside
from continual.service.canary import measuring, stages, verdicts
from continual.service.control.turns import Turns
from continual.service.failures import Failures, told
from continual.service.outgoing import outgoing
from continual.state.canaries import CanaryRecord


class CanaryWatch:
    """Watches the canaries of the open `merge`. `fresh` is called when something else is to go out, `again` with the
    models that are to be looked at again."""

    def __init__(
        self,
        merge: Merge,
        failures: Failures,
        turns: Turns,
        fresh: Callable[[], None],
        again: Callable[[list[Candidate]], None],
    ) -> None:
        self._merge = merge
        self._metrics = failures.metrics
        self._news = failures.news
        self._health = failures.health
        self._turns = turns
        self._fresh = fresh
        self._again = again
        self._events: dict[str | None, asyncio.Event] = {}
        self._told: set[str | None] = set()
        self._changed = asyncio.Event()
        self._log = structlog.get_logger("continual")

    def turned(self, name: str | None) -> None:
        """Hears that a canary has come further."""
        if name in self._events:
            self._events[name].set()

    def heard(self, repo: str) -> None:
        """Hears that something happened in a repo of the Hub: a pull request may have been merged there."""
        for name in self._events:
            known = name is None or name in self._merge.settings.views
            if known and outgoing(self._merge.settings, name).asked.repo == repo:
                self._told.add(name)
                self._events[name].set()

    def reloaded(self) -> None:
        """Hears that the settings are others."""
        self._changed.set()
        for event in self._events.values():
            event.set()

    async def prepare(self) -> None:
        """What has to be done before anything is folded. Raises Retry and Damaged."""
        await asyncio.to_thread(stages.prepare, self._merge)

    async def run(self) -> None:
        """Watches all that the settings name; ends when it is cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for name in (None, *self._merge.settings.views):
                    if name not in self._events and outgoing(self._merge.settings, name).canary is not None:
                        self._events[name] = asyncio.Event()
                        group.create_task(self._keep(name))
                await self._changed.wait()
                self._changed.clear()

    async def _keep(self, name: str | None) -> None:
        """Watches one, as long as the settings want it."""
        event = self._events[name]
        which = f"view {name}" if name else "the merge"
        failures = 0
        while True:
            event.clear()
            known = name is None or name in self._merge.settings.views
            if not known or outgoing(self._merge.settings, name).canary is None:
                del self._events[name]
                await asyncio.to_thread(stages.prepare, self._merge)
                self._health.works("canary", which)
                return
            pause: float | None = None
            try:
                pause = await self._look(name, which)
                failures = 0
            except Exception as error:  # whatever it is, the folds go on, and what is out stays
                failures += 1
                pause = retry_delay(failures)
                self._metrics.error("canary")
                self._health.fails("canary", which, told(error))
                trace = None if isinstance(error, OSError | ContinualError) else error
                self._log.error("canary failed", what=which, error=told(error), retry_seconds=pause, exc_info=trace)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), pause)

    async def _look(self, name: str | None, which: str) -> float | None:
        """Does what is due. Seconds until something is; None: until it is told."""
        canary = outgoing(self._merge.settings, name).canary
        assert canary is not None
        record = await asyncio.to_thread(self._merge.state.canaries.get, name)
        self._metrics.canaries(await asyncio.to_thread(lambda: len(self._merge.state.canaries.all())))
        if record is not None and record.phase == "failed":
            await self._take_back(name, record)
            record = None
        if record is None or record.phase != "watched":
            self._health.works("canary", which)
            return None
        pause = verdicts.wait(record, canary, datetime.now(UTC))
        told = name in self._told
        self._told.discard(name)
        if pause != 0.0 and not told:
            return pause
        after = await self._measure(name, which, record) if pause == 0.0 else record
        if after is not None and after.phase == "watched" and after.request is not None:
            after = await aside(partial(stages.ask_request, self._merge, after)) or after
        if after is not None and after.phase == "watched":
            return verdicts.wait(after, canary, datetime.now(UTC)) or canary.interval
        self._fresh()
        return 0.0

    async def _measure(self, name: str | None, which: str, record: CanaryRecord) -> CanaryRecord | None:
        """Looks at a canary, and keeps what was seen and what follows from it."""
        out = outgoing(self._merge.settings, name)
        canary = out.canary
        assert canary is not None
        found, begun = None, time.monotonic()
        if verdicts.measures(canary):
            found = await aside(partial(measuring.measure, self._merge, out, record))
            self._metrics.canary_measured(found.verdict)
            log = self._log.info if found.verdict == "passed" else self._log.warning
            log("canary", what=which, seq=record.seq, verdict=found.verdict, said=found.said)
        now, took = datetime.now(UTC), time.monotonic() - begun

        def decided(before: CanaryRecord) -> CanaryRecord:
            same = (before.seq, before.since) == (record.seq, record.since)
            return verdicts.measured(before, found, canary, now, took) if same else before

        after = await asyncio.to_thread(self._merge.state.canaries.change, name, decided)
        if after is not None and verdicts.inconclusive(after) >= canary.failure_limit:
            of = f"record {after.seq} is neither promoted nor taken back"
            self._health.fails("canary", which, f"{of}: {after.measured[-1].said}")
        else:
            self._health.works("canary", which)
        return after

    async def _take_back(self, name: str | None, record: CanaryRecord) -> None:
        """Has a canary taken back at a turn of the thread that writes the state."""
        again = await self._turns.ask("canary", lambda: stages.take_back(self._merge, name))
        self._metrics.canary_ended("failed")
        of = f" of the view {name}" if name else ""
        self._news("canary", f"record {record.seq}{of} was a canary, and is taken back: {record.why}")
        view = {"view": name} if name else {}
        self._log.error("taken back", **view, seq=record.seq, why=record.why, again=[one.name for one in again])
        if again:
            self._again(again)
        self._fresh()
