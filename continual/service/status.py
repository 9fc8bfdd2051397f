"""The status of a state: from the running daemon over HTTP, from inside it, or from the files alone."""

from __future__ import annotations

import os
import shutil
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from continual import provenance, tuning
from continual import selection as rounds
from continual.api import Merge
from continual.config import Settings
from continual.records import Event, Totals
from continual.rules import ReadOptions
from continual.service.metrics import peak_memory
from continual.service.queue import Queue
from continual.service.web import Status, parse
from continual.sources.hub import HubSource
from continual.state import Commit, lock
from continual.state.ledger import Waiting
from continual.texts import Json, plain, record

_SHOWN = 15
_QUEUED = 50
"""Names of waiting candidates that are told; the Hub can have thousands."""
_RECENT = 2000
"""Records among which publications are looked for."""
_STUCK = 900.0
"""Seconds without any progress in a fold after which the daemon no longer calls itself healthy."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself: a proxy of the environment (`http_proxy`) is never used for that."""
_SILENT = 30.0


class Live:
    """What the daemon is doing now, and the view the service shows of it. Written by the daemon, read by the service."""

    def __init__(self, merge: Merge, queue: Queue, hub: HubSource | None = None) -> None:
        self.merge = merge
        self.queue = queue
        self.hub = hub
        self.url: str | None = None
        self.scanned = False
        self.beat = time.monotonic()
        self.current: Event | None = None
        self.rounding = False
        self._begun = time.monotonic()
        self._moved = time.monotonic()
        self._stage: tuple[str, int, int] = ("", 0, 0)

    def begin(self, event: Event) -> None:
        """A candidate is looked at."""
        self.current, self._stage, self._moved = event, ("inspect", 0, 1), time.monotonic()

    def begin_round(self) -> None:
        """A round is run."""
        self.rounding, self._stage, self._moved = True, ("load", 0, 1), time.monotonic()

    def end(self) -> None:
        """It is done with."""
        self.current, self.rounding = None, False

    @property
    def doing(self) -> str | None:
        """What is done now: the name of a candidate, or a round."""
        if self.rounding:
            return "a round over the pool"
        return None if self.current is None else self.current.name

    def progress(self, stage: str, done: int, total: int) -> None:
        """The engine's progress callback."""
        self._stage, self._moved = (stage, done, total), time.monotonic()

    def healthy(self) -> tuple[bool, str]:
        """Not if the event loop or a fold has been standing still."""
        now = time.monotonic()
        if now - self.beat > _SILENT:
            return False, f"no heartbeat for {now - self.beat:.0f} s"
        if self.doing is not None and now - self._moved > _STUCK:
            return False, f"{self.doing}: no progress for {now - self._moved:.0f} s"
        return True, "ok"

    def ready(self) -> tuple[bool, str]:
        """Once every folder has been scanned."""
        return (True, "ok") if self.scanned else (False, "the first scan of the watched folders is under way")

    def log(self, limit: int, before: int | None) -> list[dict[str, Json]]:
        """Records of the ledger."""
        commits = self.merge.state.ledger.log[: len(self.merge.state.ledger.log) if before is None else before]
        return [record(c) for c in commits[-limit:]]

    def status(self) -> Status:
        """Everything there is to show."""
        good, why = self.healthy()
        stage, done, total = self._stage
        doing = self.doing
        return _status(
            self.merge,
            health="ok" if good else "stuck",
            why="" if good else why,
            pid=os.getpid(),
            url=self.url,
            uptime=time.monotonic() - self._begun,
            queue=[w.event.name for w in self.queue.ordered()],
            hub=self.hub,
            current=None if doing is None else {"model": doing, "stage": stage, "done": done, "total": total},
            memory=peak_memory(),
        )


def ask(state: Path) -> dict[str, Any] | None:
    """What the daemon on `state` answers; None if none runs or it does not answer."""
    url = lock.holder(state / "lock").get("url")
    if not isinstance(url, str) or not url.startswith("http://"):
        return None
    try:
        with _DIRECT.open(f"{url}/api/status", timeout=5) as answer:
            body = parse(answer.read().decode())
    except (OSError, ValueError):
        return None
    return body if Path(str(body["state"])) == state.absolute() else None


def at_rest(settings: Settings) -> dict[str, Any]:
    """The same from the files, where no daemon runs."""
    with Merge(settings) as merge:
        found = _status(
            merge,
            health="not running",
            why="no daemon has this state open",
            pid=None,
            url=None,
            uptime=None,
            queue=[],
            hub=None,
            current=None,
            memory=None,
        )
    return cast("dict[str, Any]", plain(found))


def _status(
    merge: Merge,
    *,
    health: str,
    why: str,
    pid: int | None,
    url: str | None,
    uptime: float | None,
    queue: list[str],
    hub: HubSource | None,
    current: dict[str, Any] | None,
    memory: float | None,
) -> Status:
    state, folds = merge.state, merge.state.ledger.folds()
    tuned, made = tuning.in_force(state), state.format.base
    refused = state.ledger.refusals[-_SHOWN:]
    pool, last = merge.pool(), rounds.last_round(state)
    return Status(
        version=provenance.software()["continual"],
        health=health,
        why=why,
        pid=pid,
        url=url,
        uptime_seconds=uptime,
        state=str(state.path.absolute()),
        state_id=state.id,
        base=f"{made['repo']}@{made['revision'][:12]}" if made.get("repo") else made["path"],
        rule=state.format.rule,
        options=state.format.options,
        scale=str(ReadOptions.from_mapping(state.ledger.read_options(state.ledger.head.seq))),
        tuned=None if tuned is None else {"record": tuned.seq, "folds": (tuned.entry.numbers or {})["folds"]},
        watch=[str(path) for path in merge.settings.watch],
        hub=None if hub is None else _hub(merge, hub),
        head=state.ledger.head.seq,
        folds=len(folds),
        generations=len(state.generations()),
        state_bytes=state.generation_bytes(),
        disk_free_bytes=shutil.disk_usage(state.path).free,
        totals=state.ledger.totals,
        gauges=merge.rule.read.gauges(Totals.of(state.ledger.totals)),
        queue=queue[:_QUEUED],
        queued=len(queue),
        select=merge.selects,
        pool_size=len(pool),
        pool=[_waiting(w) for w in list(pool.values())[-_SHOWN:]],
        last_round=None if last is None else _round(last),
        current=current,
        last_folds=[_fold(c) for c in reversed(folds[-_SHOWN:])],
        refusals=[_refusal(c) for c in reversed(refused)],
        published=[
            _published(c)
            for c in reversed([c for c in state.ledger.log[-_RECENT:] if c.entry.kind == "publish"][-_SHOWN:])
        ],
        peak_memory_bytes=memory,
    )


def _hub(merge: Merge, source: HubSource) -> dict[str, Any]:
    asked = merge.settings.hub
    polled = None if source.polled is None else datetime.fromtimestamp(source.polled, UTC).isoformat(timespec="seconds")
    what = [*(merge.places.bases if asked.watch else ()), *asked.repos, *asked.authors]
    return {"bases": what, "polled": polled, "problem": source.problem, "seen": len(source.cursor.seen)}


def _published(commit: Commit) -> dict[str, Any]:
    return {"seq": commit.seq, "time": commit.time, "message": commit.entry.message}


def _round(commit: Commit) -> dict[str, Any]:
    numbers = commit.entry.numbers or {}
    return {"seq": commit.seq, "time": commit.time, **{key: numbers[key] for key in ("loss", "before", "gap", "steps")}}


def _waiting(waiting: Waiting) -> dict[str, Any]:
    candidate, last = waiting.commit.entry.candidate or {}, waiting.last
    return {
        "model": candidate.get("name"),
        "since": waiting.since,
        "rounds": waiting.rounds,
        "score": last.get("score"),
        "z": last.get("z"),
        "said": last.get("message", "waits for its first round"),
    }


def _fold(commit: Commit) -> dict[str, Any]:
    candidate, numbers = commit.entry.candidate or {}, commit.entry.numbers or {}
    return {
        "seq": commit.seq,
        "time": commit.time,
        "model": candidate.get("name"),
        "form": candidate.get("form"),
        "tau_norm": numbers.get("tau_norm"),
        "cosine": numbers.get("cosine"),
        "weight": numbers.get("weight"),
    }


def _refusal(commit: Commit) -> dict[str, Any]:
    return {
        "seq": commit.seq,
        "time": commit.time,
        "model": (commit.entry.candidate or {}).get("name"),
        "reason": commit.entry.reason,
        "message": commit.entry.message,
    }
