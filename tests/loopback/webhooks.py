"""Webhooks as the Hub sends them: the documented payload, one delivery, and deliveries in a thread that misbehave on
demand."""

from __future__ import annotations

import http.client
import json
import queue
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tests.loopback.repos import Repo

if TYPE_CHECKING:
    from tests.loopback.hub import Hub

WEBHOOK = "6639a0b5c7b6a4d1e2f30001"  # the id of the one webhook there is


class Moved(NamedTuple):
    """The new name of a repository."""

    id: str


@dataclass(frozen=True)
class Change:
    """Something that happened to a repository, with the repository as it was after it (for a deletion or a move,
    before).

    `refs` are (ref, old sha, new sha); None where there was or is none.
    """

    action: Literal["create", "update", "delete", "move"]
    scope: Literal["repo", "repo.content", "repo.config"]
    repo: Repo
    refs: tuple[tuple[str, str | None, str | None], ...] = ()
    moved: Moved | None = None


def owner_id(owner: str) -> str:
    return owner.encode().hex()[:24].ljust(24, "0")


def payload(endpoint: str, change: Change) -> dict[str, Any]:
    """The body of version 3 webhooks."""
    repo = change.repo
    body: dict[str, Any] = {
        "event": {"action": change.action, "scope": change.scope},
        "repo": {
            "type": "model",
            "name": repo.id,
            "id": repo.key,
            "private": repo.private,
            "headSha": repo.head.sha if repo.head else None,
            "tags": [],
            "url": {"web": f"{endpoint}/{repo.id}", "api": f"{endpoint}/api/models/{repo.id}"},
            "owner": {"id": owner_id(repo.owner)},
        },
        "webhook": {"id": WEBHOOK, "version": 3},
    }
    if change.refs:
        body["updatedRefs"] = [{"ref": ref, "oldSha": old, "newSha": new} for ref, old, new in change.refs]
    if change.moved:
        owner = change.moved.id.partition("/")[0]
        body["movedTo"] = {"name": change.moved.id, "owner": {"id": owner_id(owner)}}
    return body


def post(url: str, secret: str, body: Mapping[str, Any], timeout: float = 5.0) -> int | None:
    """Posts one payload; the status, or None if nobody answered."""
    headers = {"Content-Type": "application/json", "X-Webhook-Secret": secret}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (OSError, http.client.HTTPException):
        return None


class Deliveries:
    """Delivers every change of a Hub to its webhooks from a thread, while the `with` block lasts.

    `duplicate` and `drop` are the chances of a delivery made twice and of one never made; `shuffle` mixes those that
    wait. A delivery not answered with 2xx is tried `attempts` times in all, `pause` seconds apart. What was sent is in
    `sent`.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        seed: int = 0,
        duplicate: float = 0.0,
        drop: float = 0.0,
        shuffle: bool = False,
        attempts: int = 5,
    ) -> None:
        self.sent: list[tuple[str, Change, int | None]] = []
        self.pause = 0.05
        self._hub, self._duplicate, self._drop, self._shuffle, self._attempts = hub, duplicate, drop, shuffle, attempts
        self._random = random.Random(seed)
        self._queue: queue.Queue[Change | None] = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def __enter__(self) -> Deliveries:
        self._hub.listeners.append(self._queue.put)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hub.listeners.remove(self._queue.put)
        self._closed.set()
        self._queue.put(None)
        self._thread.join()

    def settle(self) -> None:
        """Waits until every change so far was delivered, dropped or given up."""
        self._queue.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            waiting = [self._queue.get()]
            if self._shuffle:
                self._closed.wait(self.pause)  # for others to queue up behind it
                while not self._queue.empty():
                    waiting.append(self._queue.get())
            for change in self._plan([c for c in waiting if c is not None]):
                for url, secret in self._hub.webhooks:
                    self._deliver(url, secret, change)
            for _ in waiting:
                self._queue.task_done()

    def _plan(self, changes: list[Change]) -> list[Change]:
        kept = [c for c in changes if self._random.random() >= self._drop]
        kept += [c for c in kept if self._random.random() < self._duplicate]
        if self._shuffle:
            self._random.shuffle(kept)
        return kept

    def _deliver(self, url: str, secret: str, change: Change) -> None:
        for _ in range(self._attempts):
            if self._closed.is_set():
                return
            status = post(url, secret, self._hub.payload(change))
            self.sent.append((url, change, status))
            if status is not None and 200 <= status < 300:
                return
            self._closed.wait(self.pause)
