"""The daemon of the campaign: when it is killed, how it is started again, and which faults the Hub has for it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from continual.state import framing
from tests.campaigns.faults.hub.lives import READER, SECRET, World
from tests.helpers.hubs import BASE
from tests.helpers.services import daemon, status
from tests.loopback import TOKEN, Change, Deliveries, Request, environment
from tests.loopback import faults as wrong


class Watcher:
    """Follows the state's files from outside: fates into `world.fates`, and every key that the cursor ever held; and
    kills when armed."""

    def __init__(self, world: World, state: Path, deliveries: Deliveries) -> None:
        self.world, self.state, self.deliveries = world, state, deliveries
        self.seen: set[str] = set()
        self.pid = 0
        self.killed = threading.Event()
        self.fell: Counter[str] = Counter()
        self._armed, self._skip, self._until = "", 0, math.inf
        self._records, self._pushes = 0, 0
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._looks = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self.world.hub.on_request = self._heard
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.world.hub.on_request = None

    def arm(self, moment: str, skip: int, patience: float) -> None:
        """Kills at the next such moment after `skip` others, at the latest in `patience` seconds."""
        with self._lock:
            self._armed, self._skip, self._until = moment, skip, time.monotonic() + patience

    @property
    def armed(self) -> bool:
        return bool(self._armed)

    def _strikes(self, moment: str) -> None:
        with self._lock:
            if self._armed != moment and moment != "time":
                return
            if moment not in ("time", "push") and self._skip > 0:
                self._skip -= 1
                return
            self._armed, self._until = "", math.inf
        os.kill(self.pid, signal.SIGKILL)
        self.fell[moment] += 1
        self.killed.set()

    def _heard(self, request: Request) -> None:
        if whose(request) == "daemon" and self._armed:
            self._strikes("fold" if request.origin == "cdn" else "poll" if request.listing else "look")

    def _run(self) -> None:
        while not self._end.wait(0.002 if self._armed in ("commit", "push") else 0.02):
            if time.monotonic() >= self._until:
                self._strikes("time")
            new = self.deliveries.sent[self._pushes :]
            self._pushes += len(new)
            if any(accepted(status) and only_pushed(change) for _, change, status in new):
                self._strikes("push")
            self.look()

    def look(self) -> None:
        """Takes what is new in the state. From any thread: what was durable before the call is known after it."""
        with self._looks:
            self._take_new()

    def _take_new(self) -> None:
        while (file := self.state / f"commits/{self._records:08d}.json").exists():
            body = framing.decode(file)[0]
            self._records += 1
            if body["candidate"] and body["kind"] in ("fold", "refuse"):
                self.world.fates[body["candidate"]["key"].rpartition("@")[2]] = body["reason"] or body["fate"]
            if self._armed:
                self._strikes("commit")
        if (cursor := self.state / "sources/hub.json").exists():
            self.seen |= {f"hub:{row[0]}@{row[1]}" for row in framing.decode(cursor)[0]["seen"] if row[1]}


def only_pushed(change: Change) -> bool:
    """Whether it is a commit of which the daemon learns by a push alone: a lost push is a lost commit."""
    return change.repo.private and change.repo.owner != "ours" and any(old for _, old, _ in change.refs)


def accepted(status: int | None) -> bool:
    return status == 202


def pushes(told_of: Sequence[tuple[Change, int | None]]) -> set[str]:
    """The keys of which the daemon said that it has heard."""
    return {
        f"hub:{change.repo.id}@{new}"
        for change, status in told_of
        if accepted(status)
        for _, _, new in change.refs
        if new
    }


def whose(request: Request) -> str:
    """Who asks: the daemon, the publisher, or somebody before the campaign begins."""
    if request.origin == "cdn":
        return "daemon" if request.method == "GET" else "publisher"
    return {f"Bearer {READER}": "daemon", f"Bearer {TOKEN}": "publisher"}.get(
        request.headers.get("authorization", ""), "nobody"
    )


def policy(seed: int, rate: float, *, outages: bool) -> wrong.Policy:
    """Faults for both; more of them where the daemon reads weights, and stale lists besides. `outages`: now and then a
    proxy denies it everything."""
    stale: list[wrong.Fault] = [wrong.Stale(n) for n in (1, 2, 4, 8)]
    slow: list[wrong.Fault] = [wrong.Slow(3e5), wrong.Drop(30_000), wrong.Drop(90_000), wrong.Truncate(50_000)]
    begun = time.monotonic()
    lists, bodies = wrong.Random(seed + 1, 2 * rate, kinds=stale), wrong.Random(seed + 3, 2 * rate, kinds=slow)
    reading = wrong.either(
        wrong.Random(seed, rate), lambda r: lists(r) if r.listing else bodies(r) if r.origin == "cdn" else None
    )
    writing = wrong.Random(
        seed + 2, rate / 2, kinds=[wrong.unavailable(), wrong.broken(), wrong.Drop(), wrong.too_many(0)]
    )

    def decide(request: Request) -> wrong.Fault | None:
        if whose(request) == "daemon":
            return wrong.Status(403) if outages and (request.at - begun) % 12 > 10.5 else reading(request)
        return writing(request) if whose(request) == "publisher" and request.origin == "api" else None

    return decide


class Service:
    """The daemon on a state, killed and started again."""

    def __init__(self, world: World, watcher: Watcher, state: Path) -> None:
        self.state = state
        self._world, self._watcher = world, watcher
        self._environment = environment(world.hub, world.work, token=READER) | {"CONTINUAL_WEBHOOK_SECRET": SECRET}
        self._flags = [f"--hub={pair}" for pair in ("watch=true", f"bases={BASE}", "poll=0.5", "settle=0.3", "sweep=4")]
        self._stack = ExitStack()

    def start(self) -> None:
        self.url: str | None = None
        self.process = self._stack.enter_context(daemon(self.state, None, *self._flags, environment=self._environment))
        self._watcher.pid = self.process.pid

    def alive(self) -> bool:
        """Whether it listens; webhooks are sent there from now on. One that was killed is started again, one that ended
        otherwise an error."""
        if self._watcher.killed.is_set():
            assert self.process.wait() == -signal.SIGKILL
            self._stack.close()
            self._world.hub.webhooks.clear()
            self._watcher.killed.clear()
            self.start()
        assert self.process.poll() is None or self._watcher.killed.is_set(), (
            f"the daemon ended with {self.process.returncode}\n{self.log()}"
        )
        if self.url is None:
            text = (self.state / "lock").read_text()
            held = json.loads(text[text.index("{") :]) if "{" in text and text.rstrip().endswith("}") else {}
            if held.get("pid") == self.process.pid and held.get("url"):
                self.url = held["url"]
                self._world.hub.webhooks[:] = [(f"{self.url}/webhook", SECRET)]
        return self.url is not None

    def status(self) -> dict[str, Any] | None:
        if self.url is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            return status(self.url)
        return None

    def log(self, lines: int = 25) -> str:
        return "\n".join((self.state.parent / "daemon.log").read_text().splitlines()[-lines:])

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self._stack.close()
        return code

    def close(self) -> None:
        self._stack.close()
