"""The folding loop of the daemon: it takes one candidate after the other, and has rounds run between them.

One thread writes the state; all waiting is on the event loop. Whatever is raised while a candidate is looked at becomes
its fate or its next try; only a Halt, which says that the state is damaged, ends the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from continual.api import Merge
from continual.engine import internal
from continual.engine.outcomes import Outcome
from continual.errors import Abandoned, Halt, Retry, Skip
from continual.hub import Trouble
from continual.records import Event
from continual.retrying import Fault, retry_delay
from continual.service import gauging
from continual.service.control.turns import Turn, Turns
from continual.service.failures import TRIES, Failures, contained, refusal, told
from continual.service.queue import Queued
from continual.service.rounds import Rounds
from continual.service.status import Live
from continual.sources.contract import Source
from continual.state.entries import Entry
from continual.state.software import software
from continual.texts import plain

T = TypeVar("T")
_LOOK = 0.2
"""Seconds between two looks at whether every source has scanned."""


class Worker:
    """Folds what the sources give, one candidate at a time. `fresh` hears that the merged model is another one, `halt`
    that only a person can go on."""

    def __init__(
        self, merge: Merge, live: Live, failures: Failures, *, fresh: Callable[[], None], halt: Callable[[Halt], None]
    ) -> None:
        self.merge = merge
        self.live = live
        self.queue = live.queue
        self.failures = failures
        self.metrics = failures.metrics
        self.rounds = Rounds(merge, live, failures, self._tell)
        self._fresh = fresh
        self._halt = halt
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")
        self.turns = Turns(self.wake)
        self._log = structlog.get_logger("continual")

    async def prepare(self) -> None:
        """Opens what folds and rounds need, so that what is missing is said at the start. Raises Halt."""
        engine = await asyncio.to_thread(lambda: self.merge.engine)
        await self.rounds.prepare()
        self.metrics.build(rule=self.merge.rule.name, device=str(engine.device), software=software())
        self.metrics.last(*gauging.last_times(self.merge.state.ledger.log))
        self.gauge()

    def wake(self) -> None:
        """Makes the loop look at once whether there is something to do."""
        self._wake.set()

    def close(self) -> None:
        """Ends the thread, when what it does is done."""
        self._thread.shutdown()

    def put(self, event: Event, source: Source) -> None:
        """Puts what a source gave into the queue. One that is being folded at this moment is not, unless its files have
        changed since. Nor is one that is settled, where that is known without opening a file."""
        current = self.live.current
        if current is not None and current.key == event.key and (current == event or event.revision is not None):
            return
        key = source.key(event)
        if key is not None and self.merge.standing.is_settled(key):
            source.settled(event, key)
            return
        self.queue.put(event, source)
        self.metrics.queue(len(self.queue.waiting))
        self.wake()

    async def run(self, sources: Sequence[Source], stop: asyncio.Event) -> None:
        """Takes one candidate after the other until `stop` is set; nothing begins before every source has scanned."""
        failed = 0
        while not stop.is_set():
            try:
                await self._turn(sources)
                failed = 0
            except Halt as error:
                self._halt(error)
            except Exception as error:  # a gauge, the clock of rounds: whatever it is, the next turn may do better
                failed += 1
                self.failures.tell(error, what="the loop that folds")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), retry_delay(failed))
        self.turns.close()

    async def on_thread(self, call: Callable[[], T]) -> T:
        """What `call` returns, run on the thread that writes the state, after what is under way there. Raises what
        `call` raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, contained(call))

    async def record(self, entry: Entry) -> None:
        """Makes a record on the thread that writes the state, after the fold under way. Raises Retry, Halt."""
        try:
            await self.on_thread(lambda: self.merge.record(entry))
        except Halt as error:
            self._halt(error)
            raise
        self.gauge()

    def gauge(self) -> None:
        """Sets the series of what the state holds now."""
        gauging.of_state(self.merge, self.live, self.metrics)

    async def _turn(self, sources: Sequence[Source]) -> None:
        """Does a command, looks at one candidate, or runs a round, or waits until there is something to do."""
        loop = asyncio.get_running_loop()
        self.live.scanned = all(source.scanned.is_set() for source in sources)
        may_fold = self.live.scanned and self.live.paused is None
        if (turn := self.turns.take()) is not None:
            await self._command(turn)
        elif may_fold and (queued := self.queue.take(loop.time())) is not None:
            await self._one(queued)
        elif may_fold and self.rounds.wait(loop.time()) == 0.0:
            if await self.rounds.run(self.on_thread):
                self._fresh()
                self.gauge()
        else:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._pause(loop.time()) if self.live.scanned else _LOOK)

    def _pause(self, now: float) -> float | None:
        """Seconds until there is something to do if nothing comes; None: for ever."""
        if self.live.paused is not None:
            return None
        due = self.queue.next_due()
        waits = (self.rounds.wait(now), None if due is None else max(0.0, due - now))
        return min((wait for wait in waits if wait is not None), default=None)

    async def _command(self, turn: Turn[object]) -> None:
        """Does what a command asked for, and tells the parts that run what came of it."""
        before = self.merge.state.ledger.model
        self.live.begin_command(turn.title)
        try:
            halt = await turn.run(self.on_thread)
        finally:
            self.live.end()
        self.live.look_paused()
        if self.merge.state.ledger.model is not before:
            self._fresh()
        self.gauge()
        if halt is not None:
            raise halt

    async def _one(self, queued: Queued) -> None:
        """Settles a candidate's fate, or puts it back. Raises Halt."""
        event = queued.event
        self.live.begin(event)
        try:
            outcome = await self._looked_at(queued)
        finally:
            self.live.end()
            self.metrics.queue(len(self.queue.waiting))
        if outcome is not None:
            queued.source.settled(event, outcome.key)
            self._tell(outcome)

    async def _looked_at(self, queued: Queued) -> Outcome | None:
        """The outcome of a candidate; None where there is none (yet). Raises Halt."""
        event = queued.event
        try:
            if await self.on_thread(lambda: queued.source.is_gone(event)):  # a file system may not answer
                self._log.info("vanished", model=event.name, path=event.origin)
                queued.source.settled(event, None)
                return None
            return await self.on_thread(lambda: self._fold(queued))
        except Abandoned as error:
            self._log.info("abandoned", model=event.name, error=str(error))
        except Skip as skipped:
            self._log.info("left out", model=event.name, why=str(skipped))
            queued.source.settled(event, None)
        except Retry as error:
            self._again(queued, error)
        except Halt:
            raise
        except Exception as error:
            return await self._broken(queued, error)
        return None

    def _fold(self, queued: Queued) -> Outcome:
        """Folds a candidate, or refuses it. Where the environment got in the way after the record was made, the record
        stands: it is the outcome."""
        before = self.merge.head
        try:
            with self.failures.tracing.staged("fold", model=plain(queued.event.name)) as span:
                outcome = self.merge.fold(queued.event, progress=self.live.progress)
                span.set_attribute("continual.fate", outcome.fate)
                span.set_attribute("continual.seq", outcome.commit.seq)
            return outcome
        except Halt:
            raise
        except Exception as error:
            last = self.merge.state.ledger.head
            fate = last.entry.fate
            if last.seq == before or fate not in ("folded", "refused", "duplicate", "deferred"):
                raise
            if last.entry.reason == "superseded":  # of an older commit, whose place this one takes
                raise
            self._log.warning("recorded, but", model=queued.event.name, seq=last.seq, error=told(error))
            return Outcome(fate, queued.event.name, last.entry.message or "", last.entry.reason, last)

    def _again(self, queued: Queued, error: Exception) -> None:
        """Puts a candidate back, to be looked at later."""
        after = error.after if isinstance(error, Retry) else 0.0
        queued.error = told(error)
        queued.denied = isinstance(error, Trouble) and error.fault in (Fault.TOKEN, Fault.DENIED)
        delay = self.queue.again(queued, asyncio.get_running_loop().time(), after)
        self.metrics.retried()
        said = "parked" if queued.parked else "retry"
        self._log.warning(said, model=queued.event.name, error=queued.error, seconds=delay)

    async def _broken(self, queued: Queued, error: Exception) -> Outcome | None:
        """What becomes of a candidate at which an exception was raised that nobody expected: it comes again, and is
        refused as `internal` when that did not help. Raises Halt."""
        event = queued.event
        queued.broke += 1

        def settled() -> Outcome | None:
            return internal.known(self.merge.engine, self.merge.places.seen(event))

        def settle() -> Outcome:
            place = self.merge.places.seen(event)
            return internal.settle(self.merge.engine, place, refusal(event.name, error))

        outcome = None
        try:
            outcome = await self.on_thread(settled)  # a restart looks at it again; what was told is not told again
            if outcome is None:
                self.failures.tell(error, model=event.name)
                outcome = await self.on_thread(settle) if queued.broke >= TRIES else None
        except Skip:
            queued.source.settled(event, None)
            return None
        except Halt:
            raise
        except Exception as more:  # it stays in the queue, with what was raised first
            self.failures.tell(error, model=event.name)
            self._log.warning("not settled", model=event.name, error=told(more))
        if outcome is None:
            self._again(queued, error)
        return outcome

    def _tell(self, outcome: Outcome) -> None:
        """One log line and the metrics of what became of a candidate."""
        log = self._log.bind(model=outcome.name, seq=outcome.commit.seq)
        if outcome.fate == "folded":
            report = outcome.report
            self.metrics.observe(report, time.time())
            self.failures.news("folded", f"{outcome.name} was folded, as record {outcome.commit.seq}")
            if report is None:
                log.info("folded")
            else:
                seconds = round(report.seconds["total"], 3)
                said = {"left_out": report.left_out, "tokens": report.tokens_left_out, "cut_others": report.cut_others}
                said["warned"] = report.numbers.warned
                out = {key: text for key, text in said.items() if text}
                log.info("folded", **report.figures(), seconds=seconds, bytes_read=report.bytes_read, **out)
            self._fresh()
        elif outcome.fate == "deferred":
            log.info("waits", pool=len(self.merge.pool()))
        elif outcome.fate == "known":
            log.debug("known", fate=outcome.commit.entry.fate)
        else:
            self.metrics.refused(outcome.reason or "unknown")
            self.failures.news("refused", f"{outcome.name} was kept out ({outcome.reason}): {outcome.message}")
            log.warning(outcome.fate, reason=outcome.reason, message=outcome.message)
        self.gauge()
