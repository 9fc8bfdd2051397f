"""The folding loop of the daemon: it takes one candidate after the other, and runs the rounds.

One thread writes the state; all waiting is on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from continual import selection, tuning
from continual.api import Merge
from continual.engine.outcomes import Outcome
from continual.errors import Abandoned, Halt, Retry, Skip
from continual.retrying import retry_delay
from continual.selection.steps import Taken
from continual.service.metrics import Metrics
from continual.service.queue import Queued
from continual.service.status import Live
from continual.sources.contract import Source
from continual.state.entries import Entry, SelectEntry, TuneEntry
from continual.state.software import software

_LOOK = 0.2
"""Seconds between two looks at whether every source has scanned."""


class Worker:
    """Folds what the sources give, one candidate at a time. `fresh` hears that the merged model is another one, `halt`
    that only a person can go on."""

    def __init__(
        self, merge: Merge, live: Live, metrics: Metrics, *, fresh: Callable[[], None], halt: Callable[[Halt], None]
    ) -> None:
        self.merge = merge
        self.live = live
        self.queue = live.queue
        self.metrics = metrics
        self._fresh = fresh
        self._halt = halt
        self._wake = asyncio.Event()
        self._asked: selection.RoundOptions | None = None
        self._round_failures = 0
        self._round_due = 0.0
        self._thread = ThreadPoolExecutor(1, "engine")
        self._log = structlog.get_logger("continual")

    async def prepare(self) -> None:
        """Opens what folds and rounds need, so that what is missing is said at the start. Raises Halt."""
        engine = await asyncio.to_thread(lambda: self.merge.engine)
        if self.merge.selects != "none":
            self._asked = self.merge.asked()
            if self._asked.settings.unsupervised:
                self._log.warning("unsupervised", message=selection.UNSUPERVISED)
            await asyncio.to_thread(self._asked.calibration.told)
        self.metrics.build(rule=self.merge.rule.name, device=str(engine.device), software=software())
        self.gauge()

    def wake(self) -> None:
        """Makes the loop look at once whether there is something to do."""
        self._wake.set()

    def close(self) -> None:
        """Ends the thread, when what it does is done."""
        self._thread.shutdown()

    async def feed(self, source: Source, stop: asyncio.Event) -> None:
        """Puts what a source gives into the queue, until `stop` is set. Raises Halt.

        A candidate that is folded at this moment is not queued again: its files are the ones that are read.
        """
        async for event in source.events(stop):
            if self.live.current is not None and self.live.current.key == event.key:
                continue
            self.queue.put(event, source)
            self.metrics.queue(len(self.queue.waiting))
            self.wake()

    async def run(self, sources: Sequence[Source], stop: asyncio.Event) -> None:
        """Takes one candidate after the other until `stop` is set; nothing begins before every source has scanned."""
        loop = asyncio.get_running_loop()
        while not stop.is_set():
            self.live.scanned = all(source.scanned.is_set() for source in sources)
            queued = self.queue.take(loop.time()) if self.live.scanned else None
            if queued is not None:
                await self._one(queued)
            elif self.live.scanned and self._round_wait(loop.time()) == 0.0:
                await self._round()
            else:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._pause(loop.time()) if self.live.scanned else _LOOK)

    async def record(self, entry: Entry) -> None:
        """Makes a record on the thread that writes the state, after the fold under way. Raises Retry, Halt."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.merge.record, entry)
        self.gauge()

    def gauge(self) -> None:
        """Sets the series of what the state holds now."""
        state = self.merge.state
        ledger = state.ledger
        self.metrics.state(state.generation_bytes(), len(state.generations()), ledger.head.seq, len(ledger.folds()))
        self.metrics.gauges(self.merge.rule.read.gauges(ledger.totals))
        last = selection.last_round(state)
        self.metrics.pool(len(ledger.pool), last.of_kind(SelectEntry) if last else None)
        tuned = tuning.in_force(state)
        self.metrics.scale(self.merge.reading().factor(), tuned.of_kind(TuneEntry).folds if tuned else 0)

    def _pause(self, now: float) -> float | None:
        """Seconds until there is something to do if nothing comes; None: for ever."""
        due = self.queue.next_due()
        waits = (self._round_wait(now), None if due is None else max(0.0, due - now))
        return min((wait for wait in waits if wait is not None), default=None)

    async def _one(self, queued: Queued) -> None:
        """Folds a candidate, or puts it back where its environment got in the way."""
        event = queued.event
        loop = asyncio.get_running_loop()
        if queued.source.is_gone(event):
            self._log.info("vanished", model=event.name, path=event.origin)
            return
        self.live.begin(event)
        try:
            outcome = await loop.run_in_executor(self._thread, self._fold, queued)
        except Abandoned as error:
            self._log.info("abandoned", model=event.name, error=str(error))
            return
        except Skip as skipped:
            self._log.info("left out", model=event.name, why=str(skipped))
            queued.source.settled(event, None)
            return
        except Retry as error:
            delay = self.queue.again(queued, loop.time(), error.after)
            self.metrics.retried()
            said = "parked" if queued.parked else "retry"
            self._log.warning(said, model=event.name, error=str(error), seconds=delay)
            return
        except Halt as error:
            self._halt(error)
            return
        finally:
            self.live.end()
            self.metrics.queue(len(self.queue.waiting))
        queued.source.settled(event, outcome.key)
        self._tell(outcome)

    def _fold(self, queued: Queued) -> Outcome:
        return self.merge.fold(queued.event, progress=self.live.progress)

    def _tell(self, outcome: Outcome) -> None:
        """One log line and the metrics of what became of a candidate."""
        log = self._log.bind(model=outcome.name, seq=outcome.commit.seq)
        if outcome.fate == "folded" and outcome.report is not None:
            report = outcome.report
            self.metrics.observe(report, time.time())
            log.info(
                "folded", **report.figures(), seconds=round(report.seconds["total"], 3), bytes_read=report.bytes_read
            )
            self._fresh()
        elif outcome.fate == "deferred":
            log.info("waits", pool=len(self.merge.pool()))
        elif outcome.fate == "known":
            log.debug("known", fate=outcome.commit.entry.fate)
        else:
            self.metrics.refused(outcome.reason or "unknown")
            log.warning(outcome.fate, reason=outcome.reason, message=outcome.message)
        self.gauge()

    def _round_wait(self, now: float) -> float | None:
        """Seconds until a round is to be run, 0 where one is due, None where none is in sight."""
        if self._asked is None:
            return None
        pool = self.merge.pool()
        clock = selection.clock()
        if pool and (self.merge.state.ledger.open_round is not None or selection.is_due(pool, self._asked, clock)):
            return max(0.0, self._round_due - now)
        return selection.next_due(pool, self._asked, clock)

    async def _round(self) -> None:
        """Runs a round. One that the environment got in the way of is tried again later, and goes on where it was."""
        loop = asyncio.get_running_loop()
        self.live.begin_round()
        try:
            found = await loop.run_in_executor(
                self._thread, lambda: self.merge.round(self.live.progress, self._heard(loop))
            )
        except Abandoned as error:
            self._log.info("abandoned", what="round", error=str(error))
            return
        except Retry as error:
            self._round_failures += 1
            delay = retry_delay(self._round_failures)
            self._round_due = loop.time() + delay
            self.metrics.retried()
            self._log.warning("retry", what="round", error=str(error), seconds=delay)
            return
        except Halt as error:
            self._halt(error)
            return
        finally:
            self.live.end()
        self._round_failures = 0
        self._tell_round(found)

    def _tell_round(self, found: selection.Round) -> None:
        """The log lines and the metrics of a round. Of those it chose for a rule, each fold has told already."""
        assert found.commit is not None
        ended = found.commit.of_kind(SelectEntry)
        self.metrics.round(found.seconds, len(ended.folds or ()), time.time())
        fates = {
            fate: sum(row.fate == fate for row in found.rows) for fate in ("folded", "deferred", "refused", "expired")
        }
        figures = {"before": round(ended.before, 6), "loss": round(ended.loss, 6), "gap": round(ended.gap, 6)}
        self._log.info("round", seq=found.commit.seq, **fates, **figures, seconds=round(found.seconds, 3))
        for row in ended.scores:
            if row.fate in ("refused", "expired"):
                self.metrics.refused(row.reason)
                self._log.warning(
                    row.fate, model=row.name, seq=found.commit.seq, reason=row.reason, message=row.message
                )
        self._fresh()
        self.gauge()

    def _heard(self, loop: asyncio.AbstractEventLoop) -> selection.HearRound:
        """Tells of each fold and step of a round; called on the thread of the round."""

        def tell(what: Outcome | Taken) -> None:
            if isinstance(what, Outcome):
                loop.call_soon_threadsafe(self._tell, what)
            else:
                self._log.info("step", number=what.number + 1, loss=round(what.loss, 6), gap=round(what.gap, 6))

        return tell
