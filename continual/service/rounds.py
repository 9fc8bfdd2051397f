"""The rounds of the daemon: when the next one is due, running it on the thread that writes the state, and telling of
it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from continual import selection
from continual.api import Merge
from continual.engine.outcomes import Outcome
from continual.errors import Abandoned, Halt, Retry
from continual.outside import few_shares
from continual.retrying import retry_delay
from continual.selection.steps import Taken
from continual.service.failures import Failures, told
from continual.service.status import Live
from continual.state.entries import SelectEntry

On = Callable[[Callable[[], selection.Round]], Awaitable[selection.Round]]
"""Runs a call on the thread that writes the state."""
_NAME = "a round over the pool"


class Rounds:
    """Runs rounds where the settings ask for them. `tell` hears of each fold of a round, as the worker's own."""

    def __init__(self, merge: Merge, live: Live, failures: Failures, tell: Callable[[Outcome], None]) -> None:
        self.merge = merge
        self.live = live
        self.failures = failures
        self.metrics = failures.metrics
        self._tell = tell
        self._asked: selection.RoundOptions | None = None
        self._failed = 0
        self._due = 0.0
        self._log = structlog.get_logger("continual")

    async def prepare(self) -> None:
        """Looks whether all that rounds need is there. Raises Halt."""
        if self.merge.selects == "none":
            return
        self._asked = self.merge.asked()
        if self._asked.settings.unsupervised:
            self._log.warning("unsupervised", message=selection.UNSUPERVISED)
        await asyncio.to_thread(self._asked.calibration.told)

    def wait(self, now: float) -> float | None:
        """Seconds until a round is to be run, 0 where one is due, None where none is in sight."""
        if self._asked is None:
            return None
        pool = self.merge.pool()
        clock = selection.clock()
        if pool and (self.merge.state.ledger.open_round is not None or selection.is_due(pool, self._asked, clock)):
            return max(0.0, self._due - now)
        return selection.next_due(pool, self._asked, clock)

    async def run(self, on_thread: On) -> bool:
        """Runs a round; whether it ended. One that failed, whatever the exception, is tried again after a delay that
        grows, and goes on where it was. Raises Halt."""
        loop = asyncio.get_running_loop()
        self.live.begin_round()
        try:
            with self.failures.tracing.span("round"):
                found = await on_thread(lambda: self.merge.round(self.live.progress, self._heard(loop)))
        except Abandoned as error:
            self._log.info("abandoned", what="round", error=str(error))
            return False
        except Halt:
            raise
        except Exception as error:
            self._failed += 1
            delay = retry_delay(self._failed)
            self._due = loop.time() + delay
            self.metrics.retried()
            self.live.health.fails("round", _NAME, told(error))
            if not isinstance(error, Retry):
                self.failures.tell(error, what="round")
            self._log.warning("retry", what="round", error=told(error), seconds=delay)
            return False
        finally:
            self.live.end()
        self._failed = 0
        self.live.health.works("round", _NAME)
        self._ended(found)
        return True

    def _ended(self, found: selection.Round) -> None:
        """The log lines and the metrics of a round. Of those it chose for a rule, each fold has told already."""
        assert found.commit is not None
        ended = found.commit.of_kind(SelectEntry)
        self.metrics.round(found.seconds, len(ended.folds or ()), time.time())
        fates = {
            fate: sum(row.fate == fate for row in found.rows) for fate in ("folded", "deferred", "refused", "expired")
        }
        figures = {"before": round(ended.before, 6), "loss": round(ended.loss, 6), "gap": round(ended.gap, 6)}
        cut = {"cut": few_shares(found.cut)} if found.cut else {}
        self._log.info("round", seq=found.commit.seq, **fates, **figures, **cut, seconds=round(found.seconds, 3))
        for fold in ended.folds or ():
            self.failures.news("folded", f"{fold.candidate.name} was folded, as record {found.commit.seq}")
        for row in ended.scores:
            if row.fate in ("refused", "expired"):
                self.metrics.refused(row.reason)
                self.failures.news("refused", f"{row.name} was kept out ({row.reason}): {row.message}")
                self._log.warning(
                    row.fate, model=row.name, seq=found.commit.seq, reason=row.reason, message=row.message
                )

    def _heard(self, loop: asyncio.AbstractEventLoop) -> selection.HearRound:
        """Tells of each fold and step of a round; called on the thread of the round."""

        def tell(what: Outcome | Taken) -> None:
            if isinstance(what, Outcome):
                loop.call_soon_threadsafe(self._tell, what)
            else:
                self._log.info("step", number=what.number + 1, loss=round(what.loss, 6), gap=round(what.gap, 6))

        return tell
