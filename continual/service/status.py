"""The status of a state: from inside the daemon, from the running daemon over HTTP, or from the files alone."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from continual import selection, texts, tuning
from continual.api.looked_state import LookedState
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.records import Event
from continual.service import showing, showing_cluster
from continual.service.health import Health, Shortfall
from continual.service.queue import Queue, Queued
from continual.service.web.view import ShownCluster, ShownQueued, ShownScale, Status, UnderWay
from continual.sources.contract import REPORTING, Source, SourceReport
from continual.state import State, going_back, paused, storing
from continual.state.entries import TuneEntry
from continual.state.software import software
from continual.texts import Json, record

if TYPE_CHECKING:
    from continual.api import Merge

_QUEUED = 50
"""Names of waiting candidates that are shown; the Hub can have thousands."""
_STUCK = 900.0
"""Seconds without any progress in a fold after which the daemon no longer calls itself healthy."""
_CLUSTER = 2.0
"""Seconds after which there is something new to show of a cluster that works."""
_SILENT = 30.0
"""Seconds without a turn of the event loop after which it does not, either."""


@dataclass(frozen=True, slots=True)
class Running:
    """What is to be said of a daemon besides its state. The default: none runs."""

    health: str = "not running"
    why: str = "no daemon has this state open"
    pid: int | None = None
    url: str | None = None
    uptime_seconds: float | None = None
    paused: str | None = None
    degraded: Sequence[Shortfall] = ()
    queue: Sequence[ShownQueued] = ()
    queued: int = 0
    sources: Mapping[str, SourceReport] = field(default_factory=dict)
    notes: Sequence[str] = ()
    current: UnderWay | None = None
    peak_memory_bytes: float | None = None
    cluster: ShownCluster | None = None


class Live:
    """What the daemon does now, and the view of it that the service shows. Written by the daemon, read by the
    service."""

    def __init__(
        self, merge: Merge, queue: Queue, sources: Sequence[Source] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` tells seconds that never go back."""
        self.merge = merge
        from continual.service.recalling import Recalling

        self.recalling = Recalling(merge)
        self.directory = str(merge.state.path.absolute())
        self.queue = queue
        self.sources = sources
        self.health = Health(clock)
        self.figures = FIGURES
        self.url: str | None = None
        self.scanned = False
        self.current: Event | None = None
        self._rounding = False
        self._command: str | None = None
        self.paused: str | None = None
        self.ending = ""
        self.look_paused()
        self._clock = clock
        self._begun = self._moved = self._beaten = clock()
        self._stage: tuple[str, int, int] = ("", 0, 0)

    def beat(self) -> None:
        """The event loop turns."""
        self._beaten = self._clock()

    def begin(self, event: Event) -> None:
        """A candidate is looked at from now on."""
        self.current = event
        self.progress("inspect", 0, 1)

    def begin_round(self) -> None:
        """A round runs from now on."""
        self._rounding = True
        self.progress("load", 0, 1)

    def begin_command(self, title: str) -> None:
        """A command runs from now on that somebody asked the daemon for."""
        self._command = title
        self.progress("begin", 0, 1)

    def end(self) -> None:
        """The candidate, the round or the command is done with."""
        self.current = self._command = None
        self._rounding = False

    def look_paused(self) -> None:
        """Finds out since when folding is paused; None if it is not."""
        self.paused = paused.since(self.merge.state.path)

    @property
    def doing(self) -> str | None:
        """What is done now: the name of a candidate, a round, or a command."""
        if self._command is not None:
            return f"the command {self._command}"
        if self._rounding:
            return "a round over the pool"
        return None if self.current is None else self.current.name

    @property
    def done(self) -> float | None:
        """Which share is done of the stage that a fold or a round is in; None where nothing is done."""
        _, done, total = self._stage
        return None if self.doing is None else done / total if total else 0.0

    def progress(self, stage: str, done: int, total: int) -> None:
        """Hears how far the candidate or the round is: the engine's progress callback."""
        self._stage = (stage, done, total)
        self._moved = self._clock()

    def line(self) -> str:
        """What is done now, in a line for who asks the service manager."""
        good, why = self.healthy()
        if not good:
            return why
        if self.doing is not None:
            stage, done, total = self._stage
            ending = f"; {self.ending}" if self.ending else ""
            return f"{self.doing}: {stage} {done} of {total}; {len(self.queue.waiting)} wait{ending}"
        if self.paused is not None:
            return texts.paused_since(self.paused)
        return f"waits for models; record {self.merge.head}, {len(self.queue.waiting)} wait"

    def healthy(self) -> tuple[bool, str]:
        """Not if the event loop, a fold or a round has been standing still."""
        now = self._clock()
        if now - self._beaten > _SILENT:
            return False, f"no heartbeat for {now - self._beaten:.0f} s"
        if self.doing is not None and now - self._moved > _STUCK:
            return False, f"{self.doing}: no progress for {now - self._moved:.0f} s"
        return True, "ok"

    def ready(self) -> tuple[bool, str]:
        """Once every source has looked once. One that is degraded is ready, and says so: what it still does it goes on
        doing, and a person can only see what is wrong on a page that is reached."""
        if not self.scanned:
            return False, "the first look of the sources is under way"
        found = self.shortfalls()
        return True, "\n".join(
            ["degraded" if found else "ok", *(f"{short.reason}: {short.message}" for short in found)]
        )

    def _queued(self) -> list[ShownQueued]:
        """Some of those that wait: those that failed first, then the others in their order."""
        failed = [queued for queued in list(self.queue.waiting.values()) if queued.attempt]
        failed.sort(key=lambda queued: queued.due)
        new = [queued for queued in self.queue.ordered() if not queued.attempt] if len(failed) < _QUEUED else []
        now = datetime.now(UTC)
        return [_shown(queued, now, queued.due - self._clock()) for queued in [*failed, *new][:_QUEUED]]

    def shortfalls(self) -> list[Shortfall]:
        """What keeps the daemon from doing its work as it should; empty if nothing does."""
        return self.health.found(self.sources, self.queue.waiting.values())

    def log(self, limit: int, before: int | None) -> list[dict[str, Json]]:
        """Records of the ledger."""
        state = self.merge.state
        generations = going_back.reachable(state)
        shown = state.ledger.log[:before][-limit:]
        return [{**record(commit), **going_back.marked(commit, generations)} for commit in shown]

    def is_ending(self) -> bool:
        """Whether the daemon stops: nobody may wait for it any more."""
        return self.merge.stopping.is_set()

    def stamp(self) -> str:
        """A word that is another one when there is something new to show, and once a minute; every two seconds while
        orders are out on a cluster."""
        head, queue = self.merge.state.ledger.head, self.queue.waiting
        tries = sum(queued.attempt for queued in list(queue.values()))
        wrong = [(shortfall.reason, shortfall.message) for shortfall in self.shortfalls()]
        every = _CLUSTER if self.figures.is_driving else 60.0
        turn = int(self._clock() / every), self.figures.is_driving
        now = (head.crc, len(queue), tries, self.doing, self.paused, self.ending, self.scanned, wrong, turn)
        return hashlib.blake2s(repr(now).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()

    def under_way(self) -> UnderWay | None:
        """What is done now, and how far it is."""
        doing = self.doing
        return None if doing is None else UnderWay(doing, *self._stage)

    def free_bytes(self) -> int | None:
        """Bytes that are free on the disk of the state; None of one on an object store."""
        return storing.free(self.merge.state.path)

    def cluster(self) -> ShownCluster | None:
        """What is known of the cluster; None where all is done on this machine. Nothing is asked of it."""
        if self.merge.settings.executor == "local":
            return None
        address = self.merge.settings.ray.address
        return showing_cluster.shown(address, self.figures.seen(address), self.figures.clock())

    def _word(self, *, good: bool, degraded: bool) -> str:
        """The health in a word: what a person should know first."""
        if not good:
            return "stuck"
        if self.ending:
            return "stopping"
        return "degraded" if degraded else "ok" if self.paused is None else "paused"

    def status(self) -> Status:
        """Everything there is to show."""
        from continual.service.metrics import peak_memory

        good, why = self.healthy()
        found = self.shortfalls()
        if good:
            why = "; ".join(shortfall.message for shortfall in found)
        reports: dict[str, SourceReport] = {}
        for source in self.sources:
            reports.setdefault(source.name, source.report())
        return _status(
            self.merge,
            Running(
                health=self._word(good=good, degraded=bool(found)),
                why="; ".join(part for part in (self.ending, why, texts.paused_since(self.paused)) if part),
                paused=self.paused,
                degraded=found,
                pid=os.getpid(),
                url=self.url,
                uptime_seconds=self._clock() - self._begun,
                queue=self._queued(),
                queued=len(self.queue.waiting),
                sources=reports,
                notes=[note for source in self.sources for note in source.notes()],
                current=self.under_way(),
                peak_memory_bytes=peak_memory(),
                cluster=self.cluster(),
            ),
        )


def at_rest(settings: Settings) -> dict[str, Json]:
    """What the files say, where no daemon runs; with the keys of `ask`. Raises Misconfigured, Damaged."""
    with LookedState(settings) as merge:
        return _status(merge, Running()).body()


def _status(merge: LookedState, running: Running) -> Status:
    state = merge.state
    ledger = state.ledger
    folds = ledger.folds()
    pool = merge.pool()
    full = showing.fullness_of(merge)
    last = selection.last_round(state)
    return Status(
        version=software()["continual"],
        health=running.health,
        why=running.why,
        degraded=tuple(running.degraded),
        pid=running.pid,
        url=running.url,
        uptime_seconds=running.uptime_seconds,
        state=str(state.path.absolute()),
        state_id=state.id,
        base=_base(state),
        rule=state.format.rule,
        options=state.format.options,
        scale=str(merge.scale()),
        tuned=_tuned(state),
        watch=tuple(str(path) for path in merge.settings.watch),
        sources=_sources(running.sources),
        notes=_few(running.notes),
        paused=running.paused if running.pid is not None else paused.since(state.path),
        head=ledger.head.seq,
        back=going_back.records(state),
        folds=len(folds),
        generations=len(state.generations()),
        state_bytes=state.generation_bytes(),
        disk_free_bytes=storing.free(state.path),
        totals=ledger.totals.body() if folds else {},
        gauges={} if state.format.sparse else merge.rule.read.gauges(ledger.totals),
        queue=tuple(running.queue),
        queued=running.queued,
        select=merge.selects,
        pool_size=len(pool),
        pool=tuple(showing.waiting(waiting) for waiting in list(pool.values())[-showing.SHOWN :]),
        last_round=None if last is None else showing.ended(last),
        current=running.current,
        last_folds=tuple(showing.fold(fold, full) for fold in showing.newest(folds)),
        refusals=tuple(showing.refusal(refusal) for refusal in showing.newest(ledger.refusals)),
        published=tuple(showing.publications(ledger.log)),
        form=showing.form_of(state, full),
        views=showing.views(merge),
        shares=showing.shares(merge),
        canaries=showing.canaries(merge),
        peak_memory_bytes=running.peak_memory_bytes,
        cluster=running.cluster,
    )


def _few(notes: Sequence[str]) -> tuple[str, ...]:
    """The first of them, and how many more there are."""
    more = len(notes) - showing.SHOWN
    return (*notes[: showing.SHOWN], *([f"and {more} more of this kind"] if more > 0 else []))


def _base(state: State) -> str:
    """The base as people are told of it: a repo at a commit, or a path."""
    made = state.format.base
    return made.path if made.repo is None else f"{made.repo}@{(made.revision or '')[:12]}"


def _tuned(state: State) -> ShownScale | None:
    tuned = tuning.in_force(state)
    return None if tuned is None else ShownScale(tuned.seq, tuned.of_kind(TuneEntry).folds)


def _sources(reports: Mapping[str, SourceReport]) -> dict[str, SourceReport | None]:
    """What each kind of source says of itself; None where none of the kind runs."""
    told: dict[str, SourceReport | None] = dict.fromkeys(REPORTING)
    if not reports:
        return told
    from continual.sources import roster

    silent = [kind.name for kind in roster.KINDS if not kind.reports]
    for name, report in reports.items():
        if name not in silent:
            told[name] = replace(report, title=roster.title_of(name))
    return told


def _shown(queued: Queued, now: datetime, wait: float) -> ShownQueued:
    """A candidate that waits; `wait`: seconds until it is tried again."""
    again = (now + timedelta(seconds=max(0.0, wait))).isoformat(timespec="seconds").replace("+00:00", "Z")
    event = queued.event
    return ShownQueued(
        model=event.name,
        origin=event.origin,
        failures=queued.attempt,
        error=queued.error or None,
        next_try=again if queued.attempt else None,
    )
